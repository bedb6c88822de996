"""Under FSDP memories of the kind `mlp` train as on one process, with activation checkpointing, adapters or in full."""

import json

import pytest
import torch
from safetensors.torch import load_file

import moshi_patch
from finetune.settings.record import from_dict
from finetune.training.trainer import train
from tests.support.models import relative
from tests.support.processes import run_processes
from tests.support.training_runs import metrics, settings_for

pytestmark = pytest.mark.slow

MLP = {"enabled": True, "kind": "mlp", "layers": [1, 3], "mini_batch_size": 4, "scan_checkpoint_group_size": 2}
MODES = {"lora+ttt": {"lora": {"rank": 4}}, "full": {"lora": {}}}


def job(repo, run_dir, mode: str, **changes) -> dict:
    ttt = {**MLP, "initial_gating_alpha": 0.1}
    common = {"ttt": ttt, "max_steps": 2, "duration_sec": 1.6, "training_mode": mode, **MODES[mode]}
    return settings_for(repo, run_dir, **(common | changes))


def test_two_ranks_train_the_weights_that_one_trains(stock_repo, tmp_path, patched):
    jobs = [job(stock_repo, tmp_path / mode, mode, batch_size=1) for mode in MODES]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    words = [[tmp_path, rank, 2, tmp_path / "jobs.json"] for rank in range(2)]
    run_processes("tests.support.training_worker", words, tmp_path, seconds=300)
    for mode in MODES:
        train(from_dict(job(stock_repo, tmp_path / f"{mode} alone", mode, batch_size=2)))
        folders = [tmp_path / name / "checkpoints/checkpoint_000002/consolidated" for name in (mode, f"{mode} alone")]
        two, one = (load_file(next(folder.glob("*.safetensors"))) for folder in folders)
        assert two.keys() == one.keys()
        names = [name for name in one if moshi_patch.memory_key(name)]
        assert len(names) == 2 * 19
        for name in names:
            assert relative(two[name], one[name]) < 1e-4, name
        logged, alone = metrics(tmp_path / mode)[-1], metrics(tmp_path / f"{mode} alone")[-1]
        for key in ("gating_alpha_norm", "wo_norm"):
            name = f"ttt/layers.1/{key}"
            assert logged[name] == pytest.approx(alone[name], rel=1e-4)
        assert logged["ttt/layers.3/relative_delta"] > 0
    assert torch.is_grad_enabled()
