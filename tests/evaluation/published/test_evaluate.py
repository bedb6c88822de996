"""All benchmarks of an evaluation together: long recordings, interruptions, several ranks, and the table."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sphn
import torch

from example.make_pairs import make_benchmarks, play
from finetune.data.broken import BrokenData
from finetune.evaluation.conditions import OFF, ON
from finetune.evaluation.published.audio import MonoTokenizer
from finetune.evaluation.published.benchmark_plot import plot
from finetune.evaluation.published.benchmark_tables import benchmark_page, table
from finetune.evaluation.published.likelihood import Likelihood
from tests.support.published import evaluate, load_mimi, model_of, settings
from tests.support.published_worker import args_for
from tests.support.tiny_repository import ENVIRONMENT, ROOT, build_repo

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    return make_benchmarks(tmp_path_factory.mktemp("benchmarks"), items=4, longform_seconds=40.0)


def test_buckets_hold_the_nats_of_their_seconds(mimi, benchmarks, tmp_path):
    model = model_of(0)
    args = settings(longform=str(benchmarks / "longform"))
    result = evaluate(model, mimi, tmp_path, args)["longform"]
    assert [(b["from_seconds"], b["to_seconds"], b["files"]) for b in result["buckets"]] == [
        (0, 10, 3),
        (10, 30, 3),
        (30, 60, 1),
    ]
    assert result["context_seconds"] == pytest.approx(24 / 12.5)
    tokenizer, sums, steps = MonoTokenizer.for_model(model, mimi), np.zeros(3), np.zeros(3)
    for file in sorted((benchmarks / "longform").rglob("*.wav")):
        codes = tokenizer(file)
        with torch.no_grad():
            logits = model(codes).logits[0, 0, : codes.shape[-1] - 1]
        nats = torch.nn.functional.cross_entropy(logits, codes[0, 1, :-1], reduction="none").double().numpy()
        for index, (first, end) in enumerate([(0, 125), (125, 375), (375, 750)]):
            sums[index] += nats[first:end].sum()
            steps[index] += len(nats[first:end])
    found = [bucket[ON]["value"] for bucket in result["buckets"]]
    np.testing.assert_allclose(found, sums / steps, rtol=1e-4)
    for bucket in result["buckets"]:
        difference = bucket["reliance"]
        assert difference["value"] == pytest.approx(bucket[ON]["value"] - bucket[OFF]["value"])
        assert difference["value"] != 0


def test_all_up_to_a_length_are_the_files_that_are_so_long(mimi, benchmarks, tmp_path):
    result = evaluate(model_of(0), mimi, tmp_path, settings(longform=str(benchmarks / "longform")))["longform"]
    assert [(row["seconds"], row["files"]) for row in result["up_to"]] == [(10, 3), (30, 1)]
    (file,) = [name for name, record in result["per_file"].items() if record["steps"][2] > 0]
    record = result["per_file"][file]
    assert result["up_to"][1][ON] == {"value": sum(record[ON][:2]) / 375, "low": None, "high": None}


def test_only_the_first_minutes_of_a_file_are_heard(mimi, benchmarks, tmp_path):
    folder = str(benchmarks / "longform")
    whole = evaluate(model_of(0), mimi, tmp_path / "a", settings(longform=folder))["longform"]
    part = evaluate(model_of(0), mimi, tmp_path / "b", settings(longform=folder, max_minutes=0.25))["longform"]
    assert [(b["from_seconds"], b["to_seconds"], b["files"]) for b in part["buckets"]] == [(0, 10, 3), (10, 15.04, 3)]
    assert max(sum(record["steps"]) for record in part["per_file"].values()) == 15 * 12.5 + 0.5
    # A random Mimi gives silence codes by the last bit, and another length rounds otherwise.
    for name in (ON, OFF):
        assert part["up_to"][0][name]["value"] == pytest.approx(whole["up_to"][0][name]["value"], rel=0.05)


def test_a_bucket_within_the_first_chunk_cannot_be_changed_by_updates(mimi, benchmarks, tmp_path):
    model = model_of(0, ttt_chunk_size=150)
    result = evaluate(model, mimi, tmp_path, settings(longform=str(benchmarks / "longform")))["longform"]
    first, second, _ = result["buckets"]
    assert (first["learns"], second["learns"]) == (False, True)
    assert first[ON] == first[OFF]
    assert second[ON] != second[OFF]


def test_a_long_file_that_is_broken_stops_the_evaluation_by_name(mimi, tmp_path):
    sphn.write_wav(str(tmp_path / "good.wav"), play(np.arange(4), "A", 24_000), 24_000)
    (tmp_path / "bad.flac").write_bytes(b"no audio")
    with pytest.raises(BrokenData, match=r"paper\.longform: 1 of 2 files are broken.*bad\.flac"):
        evaluate(model_of(0), mimi, tmp_path / "store", settings(longform=str(tmp_path)))


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
    heading, rows = table(results)
    assert heading == ["set", "", "number", ON, OFF, "reliance"]
    assert {row[0] for row in rows} == {"swuggy", "sblimp", "sstorycloze", "tstorycloze", "longform"}
    assert all(len(row) == len(heading) for row in rows)
    assert ["sblimp", "accuracy", "2"] in [row[:3] for row in rows]
    assert "nats per step, the sum over a recording's steps divided by their number" in benchmark_page(results)
    for some in ({"sblimp": results["sblimp"]}, {"longform": results["longform"]}, results):
        assert plot(some).startswith(b"\x89PNG")
        assert benchmark_page(some)


def two_ranks(benchmarks: Path, folder: Path, **options) -> list[subprocess.Popen]:
    """With the repository that they read Mimi from in `folder`."""
    repo = build_repo(folder / "repo")
    jobs = [
        [
            sys.executable,
            "-m",
            "tests.support.published_worker",
            str(benchmarks),
            str(repo),
            str(folder),
            str(rank),
            "2",
        ]
        for rank in range(2)
    ]
    return [subprocess.Popen(job, cwd=ROOT, env=ENVIRONMENT, **options) for job in jobs]


def test_files_that_one_rank_cannot_use_end_the_other_too(benchmarks, tmp_path):
    shutil.copytree(benchmarks, tmp_path / "benchmarks")
    file = next((tmp_path / "benchmarks" / "longform").rglob("*.wav"))
    file.write_bytes(file.read_bytes()[:3000])
    workers = two_ranks(tmp_path / "benchmarks", tmp_path, stderr=subprocess.PIPE, text=True)
    errors = [worker.communicate(timeout=120)[1] for worker in workers]
    for error in errors:
        assert "BrokenData: paper.longform: 1 of 3 files are broken" in error, error


def test_two_ranks_find_what_one_finds(benchmarks, tmp_path):
    workers = two_ranks(benchmarks, tmp_path)
    one = evaluate(model_of(0), load_mimi(tmp_path / "repo"), tmp_path / "one", args_for(benchmarks))
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    first, second = (json.loads((tmp_path / f"results{rank}.json").read_text()) for rank in range(2))
    assert one == first == second
    shares = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "store").iterdir())]
    assert len(shares) == 2
    assert min(shares) > 0
