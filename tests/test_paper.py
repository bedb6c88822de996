"""Which of two recordings is likelier: the right answer where it is known, and what each number stands for."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import sphn
import torch
from moshi.models import LMModel, loaders

import moshi_patch
from finetune.data.loader import BrokenData
from finetune.data.tokenize import BrokenItem
from finetune.distributed import Context
from finetune.evaluation.paper.args import PaperArgs
from finetune.evaluation.paper.audio import MonoTokenizer
from finetune.evaluation.paper.evaluate import evaluate_paper, table
from finetune.evaluation.paper.likelihood import OFF, ON, Likelihood
from finetune.evaluation.paper.stats import mean_interval
from finetune.evaluation.results import ResultStore
from finetune.evaluation.settings import EvalArgs
from finetune.loss import compute_loss
from finetune.parsing import ConfigError

from .fixtures_repo import ENVIRONMENT, ROOT, build_repo
from .models import randomise_targets

from make_pairs import VOICES, make_benchmarks, make_list, play  # isort: skip
from tiny_repo import LM  # isort: skip

TINY = LM | {"text_card": 96, "dim": 32, "num_layers": 2, "num_heads": 2, "context": 24}
CHUNK = 8
TTT = {"ttt_enabled": True, "ttt_layers": [1], "ttt_chunk_size": CHUNK, "ttt_learning_rate": 0.05}
PAIRS = 60
BINOMIAL = 0.5 - 3.29 * math.sqrt(0.25 / PAIRS), 0.5 + 3.29 * math.sqrt(0.25 / PAIRS)
"""Where 99.9 % of the accuracies lie of one who tosses a coin `PAIRS` times."""

ALONE = Context(0, 1, 0, torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("patched")


@pytest.fixture(scope="module")
def mimi(tmp_path_factory):
    repo = build_repo(tmp_path_factory.mktemp("repo"))
    config = json.loads((repo / "mimi_config.json").read_text())
    return loaders.get_mimi(repo / "mimi.safetensors", config, num_codebooks=8)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A list of `PAIRS` words and non-words of six notes, twelve steps; which is which was drawn by lot."""
    folder = tmp_path_factory.mktemp("words")
    make_list(folder, np.random.default_rng(0), PAIRS, 6)
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    return make_benchmarks(tmp_path_factory.mktemp("benchmarks"), items=4, longform_seconds=40.0)


def model_of(seed: int, **changes) -> LMModel:
    torch.manual_seed(seed)
    return randomise_targets(LMModel(**TINY | TTT | changes).eval())


def settings(**paper) -> EvalArgs:
    return EvalArgs(paper=PaperArgs(**paper), bootstrap_samples=200)


def evaluate(model, mimi, folder, args, **others):
    return evaluate_paper(model, mimi, args, ALONE, ResultStore(folder, "0"), **others)


def train_on(model: LMModel, codes: torch.Tensor, steps: int = 30) -> LMModel:
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
    model = model_of(0)
    tokenizer = MonoTokenizer.for_model(model, mimi)
    lines = [json.loads(line) for line in words.read_text().splitlines()]
    heard = torch.cat([tokenizer(words.parent / line[side]) for line in lines])
    result = evaluate(train_on(model, heard), mimi, tmp_path, settings(swuggy=str(words)))["swuggy"]
    for name in (ON, OFF):
        accuracy = result[name]["value"] if side == "correct" else 1 - result[name]["value"]
        assert accuracy >= 0.95


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


def test_the_speech_is_moshis_and_the_user_is_silent(mimi):
    model = model_of(0)
    tokenizer = MonoTokenizer.for_model(model, mimi)
    pcm = play(np.array([1, 5, 2]), "A", 24_000)
    codes = tokenizer.codes(pcm)
    steps = math.ceil(len(pcm) / mimi.frame_size)
    with torch.no_grad():
        spoken, silent = mimi.encode(torch.tensor(np.stack([pcm, np.zeros_like(pcm)]))[:, None])
    assert codes.shape == (1, 1 + model.n_q, steps + max(model.delays))
    assert (codes[0, 0, :steps] == model.text_padding_token_id).all()
    assert torch.equal(codes[0, 1 : 1 + model.dep_q, :steps], spoken[: model.dep_q])
    assert torch.equal(codes[0, 1 + model.dep_q :, :steps], silent[: model.n_q - model.dep_q])
    assert (codes[..., steps:] == model.zero_token_id).all()


def test_a_recording_at_another_rate_is_heard_as_the_same(mimi, tmp_path):
    tokenizer = MonoTokenizer.for_model(model_of(0), mimi)
    for rate in (16_000, 24_000):
        sphn.write_wav(str(tmp_path / f"{rate}.wav"), play(np.array([0, 2, 1, 3]), "A", rate), rate)
    low, high = (tokenizer(tmp_path / f"{rate}.wav") for rate in (16_000, 24_000))
    assert low.shape == high.shape
    assert (low[0, 1] == high[0, 1]).float().mean() > 0.5  # of 64 codes each; 16 kHz has less of the high harmonics


def test_short_pairs_cannot_be_changed_by_updates_and_the_result_says_so(mimi, tmp_path):
    lines = []
    for number, length in enumerate([2, 3, 6, 8]):  # 4, 6, 12 and 16 steps; a chunk has 8
        for side in ("good", "bad"):
            notes = np.random.default_rng([number, side == "good"]).integers(7, size=length)
            sphn.write_wav(str(tmp_path / f"{number}{side}.wav"), play(notes, "A", 24_000), 24_000)
        lines.append(json.dumps({"id": number, "correct": f"{number}good.wav", "incorrect": f"{number}bad.wav"}) + "\n")
    (tmp_path / "list.jsonl").write_text("".join(lines))
    args = settings(swuggy=str(tmp_path / "list.jsonl"))
    result = evaluate(model_of(0), mimi, tmp_path / "store", args)["swuggy"]
    control = result["beyond_first_chunk"]
    assert (control["pairs"], control["share"]) == (2, 0.5)
    assert control["largest_change_of_the_others_nats"] == 0.0
    for number in range(4):
        record = result["per_pair"][str(number)]
        assert (record[ON] == record[OFF]) == (number < 2)


def test_a_model_without_ttt_and_a_baseline_are_scored_as_they_are(mimi, words, tmp_path):
    args = settings(swuggy=str(words), max_items=6)
    stock, trained = model_of(1, ttt_enabled=False), model_of(0)
    alone = evaluate(stock, mimi, tmp_path / "a", args)["swuggy"]
    beside = evaluate(trained, mimi, tmp_path / "b", args, baseline=stock)["swuggy"]
    assert "beyond_first_chunk" not in alone
    assert beside["baseline"] == alone["stock"]
    assert {ON, OFF, "baseline", f"{ON} - {OFF}", f"{ON} - baseline"} <= beside.keys()
    difference = beside[ON]["value"] - beside["baseline"]["value"]
    assert beside[f"{ON} - baseline"]["value"] == pytest.approx(difference)


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


def break_files(folder, pairs):
    """`pairs` good pairs and one with a broken recording of each kind; returns what must be said of them."""
    make_list(folder, np.random.default_rng(5), pairs, 2)
    audio = folder / "audio"
    whole = (audio / "0000_good.wav").read_bytes()
    (audio / "empty.wav").write_bytes(b"")
    (audio / "cut.wav").write_bytes(whole[:6000])
    (audio / "header.wav").write_bytes(whole[:44])
    stereo = (ROOT / "example" / "data" / "boat.wav").read_bytes()
    (audio / "stereo.wav").write_bytes(stereo)
    said = {"empty": "no suitable format", "cut": "cut off after", "header": "no audio", "stereo": "2 channels"}
    said["missing"] = "No such file"
    with (folder / "pairs.jsonl").open("a") as file:
        for name in said:
            line = {"id": name, "correct": "audio/0000_good.wav", "incorrect": f"audio/{name}.wav"}
            file.write(json.dumps(line) + "\n")
    return said


def test_recordings_that_cannot_be_used_are_named(mimi, tmp_path):
    tokenizer = MonoTokenizer.for_model(model_of(0), mimi)
    for name, message in break_files(tmp_path, 1).items():
        with pytest.raises(BrokenItem, match=rf"{name}\.wav.*{message}"):
            tokenizer(tmp_path / "audio" / f"{name}.wav")


def test_a_few_broken_pairs_are_skipped_by_name_and_counted(mimi, tmp_path):
    broken = break_files(tmp_path, 95)
    result = evaluate(model_of(0), mimi, tmp_path / "store", settings(swuggy=str(tmp_path / "pairs.jsonl")))["swuggy"]
    assert result["pairs"] == 95
    assert len(result["skipped"]) == 5
    for name in broken:
        assert any(f"{name}.wav" in reason for reason in result["skipped"])


def test_many_broken_pairs_stop_the_evaluation(mimi, tmp_path):
    break_files(tmp_path, 20)
    args = settings(swuggy=str(tmp_path / "pairs.jsonl"))
    with pytest.raises(BrokenData, match=r"paper\.swuggy: 2 of 25 pairs cannot be used, more than 5%; the last: .*wav"):
        evaluate(model_of(0), mimi, tmp_path / "store", args)


def test_a_set_that_is_missing_stops_before_anything_is_scored(mimi, words, tmp_path):
    args = settings(swuggy=str(words), tstorycloze=str(tmp_path))
    with pytest.raises(ConfigError, match=r"paper\.tstorycloze"):
        evaluate(model_of(0), mimi, tmp_path / "store", args)
    assert not list((tmp_path / "store").iterdir())


def test_a_model_that_predicts_no_audio_is_refused(mimi):
    with pytest.raises(ConfigError, match="dep_q=0: the model predicts no audio"):
        MonoTokenizer(mimi, n_q=8, dep_q=0, delays=[0] * 9, padding_id=3, zero_id=-1)
    with pytest.raises(ConfigError, match=r"mimi\.num_codebooks=8: at least 12 are needed"):
        MonoTokenizer(mimi, n_q=16, dep_q=12, delays=[0] * 17, padding_id=3, zero_id=-1)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(mimi, benchmarks, tmp_path, monkeypatch):
    args = settings(sstorycloze=str(benchmarks), longform=str(benchmarks / "longform"), batch_steps=100)
    expected = evaluate(model_of(0), mimi, tmp_path / "straight", args)
    calls = []
    score = Likelihood.__call__

    def interrupted(self, codes):
        calls.append(len(codes))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return score(self, codes)

    monkeypatch.setattr(Likelihood, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model_of(0), mimi, tmp_path / "store", args)
    assert evaluate(model_of(0), mimi, tmp_path / "store", args) == expected
    batches = 4 + 3  # a story of 40 steps and its double fill a batch; three files
    assert len(calls) == 2 * batches + 2  # on and off, and what was interrupted in the middle


def test_everything_is_in_the_table_and_in_json(mimi, benchmarks, tmp_path):
    root = str(benchmarks)
    args = settings(
        swuggy=f"{root}/sLM21-dataset", sblimp=f"{root}/sLM21-dataset", sstorycloze=root, tstorycloze=root,
        longform=f"{root}/longform", max_items=2,
    )  # fmt: skip
    results = evaluate(model_of(0), mimi, tmp_path, args)
    assert json.loads(json.dumps(results)) == results
    heading, *rows = table(results)
    assert heading == ["set", "", "items", ON, OFF, f"{ON} - {OFF}"]
    assert {row[0] for row in rows} == {"swuggy", "sblimp", "sstorycloze", "tstorycloze", "longform"}
    assert all(len(row) == len(heading) for row in rows)
    assert ["sblimp", "accuracy"] in [row[:2] for row in rows]


def test_two_ranks_find_what_one_finds(mimi, benchmarks, tmp_path):
    jobs = [
        [
            sys.executable,
            "-m",
            "tests.paper_worker",
            str(benchmarks),
            str(tmp_path / f"of{world}"),
            str(rank),
            str(world),
        ]
        for world in (1, 2)
        for rank in range(world)
    ]
    workers = [subprocess.Popen(job, cwd=ROOT, env=ENVIRONMENT) for job in jobs]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    one, first, second = (
        json.loads((tmp_path / folder / f"results{rank}.json").read_text())
        for folder, rank in (("of1", 0), ("of2", 0), ("of2", 1))
    )
    assert one == first == second
    shares = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "of2" / "store").iterdir())]
    assert len(shares) == 2
    assert min(shares) > 0


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


def test_the_patch_is_what_gives_a_model_its_updates(mimi):
    assert Likelihood(model_of(0), settings()).chunk_size == CHUNK
    assert Likelihood(model_of(0, ttt_enabled=False), settings()).chunk_size is None
    assert moshi_patch.is_installed()
