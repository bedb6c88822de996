"""Each benchmark of costs runs, at a tiny size, and writes what its tables read. Times themselves are not tested."""

import importlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.cost import evaluation, load, many, server, step, train_step
from tests.support.many import SharedServer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]

SMALL_STEP = {"dim": 32, "num_heads": 2, "num_layers": 6, "context": 8, "card": 2048, "text_card": 2048}
SMALL_MODEL = {
    **{"dim": 32, "num_heads": 2, "num_layers": 6, "card": 20, "text_card": 30, "context": 16},
    **{"depformer_dim": 16, "depformer_dim_feedforward": 32, "depformer_num_heads": 2, "depformer_num_layers": 1},
}


@pytest.fixture
def tiny(monkeypatch):
    """Sizes at which each benchmark takes a moment."""
    monkeypatch.setitem(step.SIZES, "small", SMALL_STEP)
    monkeypatch.setitem(train_step.SIZES, "small", train_step.SIZES["small"] | SMALL_MODEL)
    monkeypatch.setitem(evaluation.SIZES, "small", SMALL_MODEL)
    monkeypatch.setattr(evaluation, "STEPS_PER_MINUTE", 4)
    monkeypatch.setattr(train_step, "start_up", lambda args: {"stock_peak_over_file": 1.0, "ttt_peak_over_file": 1.0})


def run(name: str, folder: Path, *options: str) -> dict:
    """What `python -m benchmarks.cost.NAME OPTIONS --out FILE` writes."""
    file = folder / f"{name}.json"
    importlib.import_module(f"benchmarks.cost.{name}").main([*options, "--out", str(file)])
    found = json.loads(file.read_text())
    assert found["benchmark"] == name
    assert {"cpu", "torch", "moshi", "date"} <= set(found["machine"])
    return found


def test_layer(tmp_path):
    rows = run("layer", tmp_path, "--dim", "32", "--chunk-size", "8", "--steps", "20", "--rounds", "1")["rows"]
    assert [row["variant"] for row in rows] == 2 * ["stock", "ttt", "residual", "materialised"]
    assert all(row["time_ratio"] > 0 and row["memory_ratio"] > 0 for row in rows)
    assert all(row["operations_ratio"] > 1 for row in rows if row["variant"] != "stock")


def test_step(tmp_path, tiny):
    rows = run("step", tmp_path, "--rows", "1", "2", "--chunk-size", "4", "--chunks", "3")["results"]
    cells = [(row["rows"], row["update"]) for row in rows]
    assert cells == [(1, "hebbian"), (1, "residual"), (2, "hebbian"), (2, "residual")]
    assert all(row["ratio_p50"] > 0 and row["layers"] == ["transformer.layers.5.gating"] for row in rows)


def test_steps_of_one_chunk_are_refused_as_the_first_is_not_counted(capsys):
    with pytest.raises(SystemExit, match="2"):
        step.main(["--chunks", "1"])
    assert "--chunks 1: must be 2 or more" in capsys.readouterr().err


def test_hybrid(tmp_path):
    options = ("--dim", "128", "--mini-batch-sizes", "2", "4", "--steps", "6", "--rounds", "3", "--stream-steps", "8")
    found = run("hybrid", tmp_path, *options, "--memory-steps", "12", "--dtype", "float32")
    places = [(row["place"], row["mini_batch_size"]) for row in found["rows"]]
    assert places == [(p, c) for p in ("one pass", "forward and backward", "streamed step") for c in (2, 4)]
    assert all(row["time_ratio"] > 0 and row["operations_ratio"] > 1 for row in found["rows"])
    assert [row["group_size"] for row in found["memory"]] == [0, 8, 0, 8]
    states = [row["state_bytes_per_row"] for row in found["rows"][4:]]
    assert states[0] < states[1]


def test_train_step(tmp_path, tiny):
    rows = run("train_step", tmp_path, "--steps", "12", "--chunk-size", "4", "--rank", "2", "--rounds", "1")["results"]
    names = ["lora", "lora, w_down of 5 layers", "lora, ttt in 5 layers", "lora, residual ttt in 5 layers"]
    assert list(rows) == names
    trained = [row["trainable_parameters"] for row in rows.values()]
    assert trained[0] < trained[1] < trained[2] == trained[3]


def test_roofline(tmp_path, tiny, monkeypatch):
    roofline = importlib.import_module("benchmarks.cost.roofline")
    monkeypatch.setattr(roofline, "bandwidth", lambda device, rounds: 1e9)
    options = [
        "--rows",
        "1",
        "--chunk-size",
        "4",
        "--width",
        "32",
        "--layer-chunk",
        "8",
        "--steps",
        "20",
        "--rounds",
        "1",
    ]
    found = run("roofline", tmp_path, *options)
    assert found["moshi_7b"][0]["ratio_by_bytes"] == pytest.approx(1.08, abs=0.005)
    assert found["step"][0]["ratio"] > 0
    assert [row["direction"] for row in found["layer"]] == ["forward", "forward+backward"]


def test_evaluation(tmp_path, tiny):
    found = run("evaluation", tmp_path, "--steps", "20", "--segments", "8", "--rounds", "1")
    assert set(found["throughput"]["20 steps"]) == {"plain forward", "segments of 8"}
    assert found["memory"]["ratio"] > 0


def test_server_with_everything_left_out(tmp_path):
    """Its servers are processes of their own; tests/moshi_patch starts such ones."""
    found = run("server", tmp_path, "--cycles", "0", "--memory-cycles", "0", "--minutes", "0")
    assert found["results"] == {}
    assert len(server.encode(3)) > 0


def test_many(ttt_repo, monkeypatch):
    """With a server in this process."""
    monkeypatch.setattr(load, "ENCODED_STEPS", 20)
    monkeypatch.setattr(many, "LEAVE_S", 0.1)
    here = SharedServer(ttt_repo, rows=2)
    try:
        server = SimpleNamespace(address=here.server.address, process=SimpleNamespace(pid=os.getpid()))
        talking = many.Load([server], 2, fast=True)
        talking.turn(0.5)
        cost = talking.summary()
        steady = many.measure_hour(server, 2, 0.03, joins=2)
    finally:
        here.stop()
    assert cost["conversations"] == 2
    assert cost["processor_ms_per_frame"] > 0
    assert cost["ended_by_server"] == steady["ended_by_server"] == {}
    assert cost["frames"] > cost["answers"] > 0
    assert steady["joined"] >= 3
    assert steady["resident_mib"]["last"] > 0
