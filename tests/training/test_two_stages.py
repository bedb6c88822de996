"""In the first steps target generators and W_down alone train, then all else too, also when that was resumed."""

import itertools
import shutil

import pytest
import torch
from safetensors.torch import load_file

from finetune.settings.record import from_dict
from finetune.training.trainer import train
from tests.support.training_runs import metrics, settings_for


@pytest.fixture(autouse=True)
def _patched(patched):
    """Training installs the patch for good; here it is gone after each test."""


@pytest.fixture(scope="module")
def run(stock_repo, tmp_path_factory):
    """Its folder and settings: four steps, of which two are the first stage."""
    settings = settings_for(stock_repo, tmp_path_factory.mktemp("two") / "run", max_steps=4, ckpt_freq=1)
    settings |= {"num_ckpt_keep": None}
    settings["ttt"] |= {"first_steps": 2, "stock_lr": 2e-4}
    train(from_dict(settings))
    return settings


def saved(settings: dict, step: int) -> dict[str, torch.Tensor]:
    return load_file(f"{settings['run_dir']}/checkpoints/checkpoint_{step:06d}/consolidated/lora.safetensors")


def test_each_parameter_moves_in_its_steps(run):
    steps = [saved(run, step) for step in (1, 2, 3, 4)]
    kinds = {"first": ("conv1d", "linear_out.weight"), "later": ("lora_B",)}
    names = {kind: [name for name in steps[0] if any(part in name for part in parts)] for kind, parts in kinds.items()}
    idle = "transformer.layers.{}.gating.linear_out.lora_B.weight"
    assert len(names["first"]) == 4
    later = [name for name in names["later"] if name not in {idle.format(1), idle.format(3)}]
    for before, after in itertools.pairwise(steps):
        assert all(not torch.equal(before[name], after[name]) for name in names["first"])
    assert all(not steps[1][name].any() for name in later), "as they were made"
    assert all(steps[2][name].any() for name in later)


def test_the_rates_are_logged_as_they_are(run):
    rows = metrics(run["run_dir"])
    assert [row["lr/adapters"] == 0 for row in rows] == [True, True, False, False]
    assert rows[2]["lr/adapters"] == pytest.approx(rows[2]["lr/w_down"] / 5)


def test_resuming_within_the_first_stage_continues_bit_for_bit(run, tmp_path):
    shutil.copytree(run["run_dir"], tmp_path / "run")
    resumed = run | {"run_dir": str(tmp_path / "run"), "checkpoint": {"resume": True, "resume_step": 1}}
    train(from_dict(resumed))
    assert [row["loss"] for row in metrics(tmp_path / "run")] == [row["loss"] for row in metrics(run["run_dir"])]
    assert all(torch.equal(value, saved(run, 4)[name]) for name, value in saved(resumed, 4).items())
