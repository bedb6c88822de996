"""Under FSDP each `training_mode` moves the parameters that it moves on one process, and saves the same file."""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from finetune.settings.record import from_dict
from finetune.training.trainer import train
from tests.support.processes import run_processes
from tests.support.training_runs import metrics, settings_for
from tests.training.test_modes import GENERATORS, W_DOWN

pytestmark = pytest.mark.slow

MODES = ("full", "lora", "ttt", "lora+ttt", "frozen")


def job(repo, run_dir, mode: str, **changes) -> dict:
    return settings_for(
        repo, run_dir, training_mode=mode, lora={"rank": 4}, max_steps=2, batch_size=1, moved=True, **changes
    )


def test_two_ranks_move_what_one_moves(stock_repo, tmp_path, patched):
    jobs = [job(stock_repo, tmp_path / mode, mode, do_eval=mode == "frozen") for mode in MODES]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    words = [[tmp_path, rank, 2, tmp_path / "jobs.json"] for rank in range(2)]
    run_processes("tests.support.training_worker", words, tmp_path, seconds=300)
    reports = [json.loads((tmp_path / f"report{rank}.json").read_text()) for rank in range(2)]
    assert not [one.get("error") for report in reports for one in report if one.get("error")]
    found = {mode: {*one["moved"], *other["moved"]} for mode, one, other in zip(MODES, *reports, strict=True)}
    assert found["frozen"] == set()
    assert found["ttt"] == GENERATORS | W_DOWN
    assert all(".lora_" in name for name in found["lora"])
    assert {f"transformer.layers.{i}.gating.linear_out.lora_B.weight" for i in (1, 3)} <= found["lora"]
    in_full = {name.replace("weight", "frozen_W.weight") for name in W_DOWN}
    assert found["lora+ttt"] == GENERATORS | in_full | {
        name for name in found["lora"] if not any(name.startswith(one.removesuffix("weight")) for one in W_DOWN)
    }
    assert found["full"] >= GENERATORS | W_DOWN | {"text_emb.weight", "out_norm.alpha"}
    assert not (tmp_path / "frozen" / "checkpoints").exists()
    assert len(metrics(tmp_path / "frozen")) == 2
    assert metrics(tmp_path / "frozen", "eval")

    alone = job(stock_repo, tmp_path / "alone", "ttt") | {"batch_size": 2}
    del alone["moved"]
    train(from_dict(alone))
    name = "checkpoints/checkpoint_000002/consolidated/ttt.safetensors"
    one, two = tmp_path / "alone" / name, tmp_path / "ttt" / name
    assert load_file(one).keys() == load_file(two).keys() == GENERATORS | W_DOWN
    with safe_open(one, "pt") as first, safe_open(two, "pt") as second:
        assert first.metadata() == second.metadata(), "the fingerprint does not depend on the number of ranks"
