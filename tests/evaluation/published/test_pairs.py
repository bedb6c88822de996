"""Which of two recordings is likelier: the right answer where it is known, and what each number stands for."""

import json
import math

import numpy as np
import pytest
import sphn
import torch
from moshi.models import LMModel

from example.make_pairs import VOICES, make_benchmarks, make_list, play
from finetune.evaluation.conditions import BENEFIT, CONTROL, OFF, ON, PLAIN, RELIANCE
from finetune.evaluation.published.audio import MonoTokenizer
from finetune.evaluation.published.benchmark_tables import benchmark_page
from finetune.evaluation.published.likelihood import Likelihood
from finetune.evaluation.statistics import mean_interval
from finetune.evaluation.verdict import NO_CONTROL
from finetune.model.loss import compute_loss
from tests.support.published import evaluate, model_of, settings

PAIRS = 60
BINOMIAL = 0.5 - 4.5 * math.sqrt(0.25 / PAIRS), 0.5 + 4.5 * math.sqrt(0.25 / PAIRS)
"""Where all but 7 in a million accuracies lie of one who tosses a coin `PAIRS` times: each processor tosses anew."""

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    return make_benchmarks(tmp_path_factory.mktemp("benchmarks"), items=4, longform_seconds=40.0)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A list of `PAIRS` words and non-words of six notes, twelve steps; which is which was drawn by lot."""
    folder = tmp_path_factory.mktemp("words")
    make_list(folder, np.random.default_rng(0), PAIRS, 6)
    return folder / "pairs.jsonl"


def train_on(model: LMModel, codes: torch.Tensor, steps: int = 50) -> LMModel:
    """`steps` of AdamW on the audio of `codes [B, K, T]`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        loss = compute_loss(model.train()(codes), codes, dep_q=model.dep_q, first_codebook_weight_multiplier=10).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("codebooks", ["first", "all"])
def test_a_model_that_never_heard_the_words_tosses_a_coin(mimi, words, tmp_path, codebooks):
    result = evaluate(model_of(3), mimi, tmp_path, settings(swuggy=str(words), codebooks=codebooks))["swuggy"]
    assert result["pairs"] == PAIRS
    for name in (ON, OFF):
        assert BINOMIAL[0] < result[name]["value"] < BINOMIAL[1]
        assert result[name]["low"] < result[name]["value"] < result[name]["high"]


@pytest.mark.parametrize("side", ["correct", "incorrect"])
def test_a_model_that_heard_one_side_prefers_it(mimi, words, tmp_path, side):
    """At most 1 of 60 went wrong on three instruction sets, one and two threads; 6 may, so that none decides it."""
    model = model_of(0)
    tokenizer = MonoTokenizer.for_model(model, mimi)
    lines = [json.loads(line) for line in words.read_text().splitlines()]
    heard = torch.cat([tokenizer(words.parent / line[side]) for line in lines])
    result = evaluate(train_on(model, heard), mimi, tmp_path, settings(swuggy=str(words)))["swuggy"]
    for name in (ON, OFF):
        accuracy = result[name]["value"] if side == "correct" else 1 - result[name]["value"]
        assert accuracy >= 0.9


def test_recordings_that_are_the_same_are_half_right(mimi, tmp_path):
    sphn.write_wav(str(tmp_path / "same.wav"), play(np.arange(4), "A", 24_000), 24_000)
    line = {"id": 0, "correct": "same.wav", "incorrect": "same.wav"}
    (tmp_path / "list.jsonl").write_text(json.dumps(line) + "\n")
    result = evaluate(model_of(0), mimi, tmp_path / "store", settings(sblimp=str(tmp_path / "list.jsonl")))["sblimp"]
    assert result[ON] == {"value": 0.5, "low": None, "high": None}


def test_the_likelihood_is_that_of_a_plain_forward_pass(mimi, words):
    model = model_of(0)
    tokenizer = MonoTokenizer.for_model(model, mimi)
    codes = tokenizer(words.parent / "audio" / "0000_good.wav")
    steps = codes.shape[-1] - tokenizer.tail
    with torch.no_grad():
        output = model(codes)
    nats = torch.nn.functional.cross_entropy(
        output.logits[0, :, :steps].flatten(0, 1).float(),
        codes[0, 1 : 1 + model.dep_q, :steps].flatten(),
        reduction="none",
    )
    rows = nats.view(model.dep_q, steps).double()
    args = settings(codebooks="first")
    torch.testing.assert_close(Likelihood(model, args)([codes])[0, :steps], rows[0], rtol=1e-5, atol=1e-5)
    args.paper.codebooks, args.first_codebook_weight_multiplier = "all", 100.0
    weighted = rows[0] * 100 + rows[1:].sum(0)
    torch.testing.assert_close(Likelihood(model, args)([codes])[0, :steps], weighted, rtol=1e-5, atol=1e-5)
    assert (Likelihood(model, args)([codes])[0, steps:] == 0).all()


@pytest.mark.parametrize("codebooks", ["first", "all"])
def test_what_lies_beside_a_recording_in_a_batch_changes_nothing(mimi, words, codebooks):
    model = model_of(0)
    tokenizer = MonoTokenizer.for_model(model, mimi)
    short, long = (tokenizer.codes(play(np.arange(length) % 7, "A", 24_000)) for length in (3, 11))
    likelihood = Likelihood(model, settings(codebooks=codebooks))
    together = likelihood([short, long])
    for row, codes in enumerate((short, long)):
        alone = likelihood([codes])[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-5, atol=1e-5)
        assert (together[row, len(alone) :] == 0).all()


@pytest.mark.parametrize(("codebooks", "short"), [("first", 2), ("all", 1)])  # of all, some are predicted a step later
def test_short_pairs_cannot_be_changed_by_updates_and_the_result_says_so(mimi, tmp_path, codebooks, short):
    lines = []
    for number, length in enumerate([2, 4, 6, 8]):  # 4, 8, 12 and 16 steps; a chunk has 8
        for side in ("good", "bad"):
            notes = np.random.default_rng([number, side == "good"]).integers(7, size=length)
            sphn.write_wav(str(tmp_path / f"{number}{side}.wav"), play(notes, "A", 24_000), 24_000)
        lines.append(json.dumps({"id": number, "correct": f"{number}good.wav", "incorrect": f"{number}bad.wav"}) + "\n")
    (tmp_path / "list.jsonl").write_text("".join(lines))
    args = settings(swuggy=str(tmp_path / "list.jsonl"), codebooks=codebooks)
    result = evaluate(model_of(0), mimi, tmp_path / "store", args)["swuggy"]
    control = result["beyond_first_chunk"]
    assert (control["pairs"], control["share"]) == (4 - short, 1 - short / 4)
    assert control["largest_change_of_the_others_nats"] == 0.0
    for number in range(4):
        record = result["per_pair"][str(number)]
        assert (record[ON] == record[OFF]) == (number < short)


def test_a_model_without_ttt_and_a_baseline_are_scored_as_they_are(mimi, words, tmp_path):
    args = settings(swuggy=str(words), max_items=6)
    stock, trained = model_of(1, ttt_enabled=False), model_of(0)
    alone = evaluate(stock, mimi, tmp_path / "a", args)["swuggy"]
    beside = evaluate(trained, mimi, tmp_path / "b", args, baseline=stock)["swuggy"]
    assert "beyond_first_chunk" not in alone
    assert beside["baseline"] == alone[PLAIN]
    assert {ON, OFF, "baseline", RELIANCE, f"{ON} - baseline"} <= beside.keys()
    errors = beside["baseline"]["value"] - beside[ON]["value"]
    assert beside[f"{ON} - baseline"]["value"] == pytest.approx(errors)
    controlled = evaluate(trained, mimi, tmp_path / "b", args, baseline=stock, beside_as=CONTROL)
    assert controlled["swuggy"][BENEFIT] == beside[f"{ON} - baseline"]
    for results, other in ((controlled, "trained without TTT"), ({"swuggy": beside}, "the baseline")):
        said = f"{100 * abs(errors):.1f} points {'fewer' if errors < 0 else 'more'} errors than {other}"
        assert said in benchmark_page(results).splitlines()[0].replace("as many errors", "0.0 points more errors")
    assert NO_CONTROL in benchmark_page({"swuggy": beside})
    assert NO_CONTROL not in benchmark_page(controlled)


def test_the_sum_prefers_the_shorter_and_the_mean_need_not(mimi, tmp_path):
    for name, length in (("long", 9), ("short", 3)):
        sphn.write_wav(str(tmp_path / f"{name}.wav"), play(np.arange(length) % 7, "A", 24_000), 24_000)
    line = {"id": 0, "correct": "long.wav", "incorrect": "short.wav"}
    (tmp_path / "list.jsonl").write_text(json.dumps(line) + "\n")
    results = {}
    for normalise in ("mean", "sum"):
        args = settings(swuggy=str(tmp_path / "list.jsonl"), normalise=normalise)
        results[normalise] = evaluate(model_of(0), mimi, tmp_path / "store", args)["swuggy"]
    (long, short), steps = (results["mean"]["per_pair"]["0"][key] for key in (ON, "steps"))
    assert steps == [18, 6]
    assert results["sum"][ON]["value"] == float(long < short) == 0.0
    assert results["mean"][ON]["value"] == float(long / 18 < short / 6)
    assert "divided by" in results["mean"]["meaning"]["length_normalisation"]


def test_voices_of_one_word_count_as_one(mimi, benchmarks, tmp_path):
    result = evaluate(model_of(0), mimi, tmp_path, settings(swuggy=str(benchmarks / "sLM21-dataset")))["swuggy"]
    assert (result["pairs"], result["items"]) == (4 * len(VOICES), 4)
    right = {
        name: float(record[ON][0] / record["steps"][0] < record[ON][1] / record["steps"][1])
        for name, record in result["per_pair"].items()
    }
    words = [np.mean([right[f"{item}/{voice}"] for voice in VOICES]) for item in range(4)]
    assert result[ON]["value"] == pytest.approx(np.mean(words))
    bands = result["groups"]["frequency"]["groups"]
    assert {band: row["pairs"] for band, row in bands.items()} == {"oov": 4, "5-19": 2, "20-99": 2}
    assert result["groups"]["frequency"]["mean_over_groups"][ON] == pytest.approx(
        np.mean([row[ON] for row in bands.values()])
    )


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        values = (generator.random(80) < 0.7).astype(float)
        result = mean_interval(values, seed=seed, samples=200)
        covered += result["low"] <= 0.7 <= result["high"]
    assert 0.89 < covered / 200 < 0.99
    weighted = mean_interval(np.array([1.0, 6.0]), np.array([1.0, 2.0]), seed=0, samples=200)
    assert weighted["value"] == pytest.approx(7 / 3)
