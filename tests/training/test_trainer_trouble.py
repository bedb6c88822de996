"""Steps and data that are not usable: what is saved before a run ends, and when."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from finetune.data.broken import BrokenData
from finetune.settings.record import from_dict
from finetune.training.trainer import Trainer, TrainingDiverged, train
from tests.support.tiny_repository import DATA
from tests.support.training_runs import metrics, settings_for

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _patched(patched):
    """Training installs the patch for good; here it is gone after each test."""


@pytest.fixture
def repo(stock_repo) -> Path:
    return stock_repo


def test_a_run_that_diverges_leaves_its_last_good_checkpoint(repo, tmp_path, monkeypatch):
    run = tmp_path / "run"
    settings = settings_for(repo, run, max_steps=40, ckpt_freq=2)
    healthy = Trainer.train_step

    def poisoned(self, measure=False):
        if self.state.step == 3:
            with torch.no_grad():
                self.model.out_norm.alpha.fill_(float("nan"))  # frozen: in no checkpoint
        return healthy(self, measure)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(TrainingDiverged):
        train(from_dict(settings))
    assert [row["skipped"] for row in metrics(run)] == [0.0] * 3 + [1.0] * 9
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["checkpoint_000002"]
    monkeypatch.setattr(Trainer, "train_step", healthy)
    train(from_dict(settings | {"max_steps": 14, "checkpoint": {"resume": True}}))
    assert all(row["skipped"] == 0 and math.isfinite(row["loss"]) for row in metrics(run))
    assert len(metrics(run)) == 14


def test_data_that_breaks_the_evaluation_costs_no_step(repo, tmp_path):
    shutil.copy(DATA / "boat.json", tmp_path)
    (tmp_path / "boat.wav").write_bytes(b"RIFF")
    (tmp_path / "eval.jsonl").write_text('{"path": "boat.wav", "duration": 5}')
    settings = settings_for(repo, tmp_path / "run", do_eval=True, max_steps=2)
    settings["data"]["eval_data"] = str(tmp_path / "eval.jsonl")
    with pytest.raises(BrokenData, match=r"boat\.wav"):
        train(from_dict(settings))
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint_000002"]


def test_a_checkpoint_due_at_a_bad_step_is_made_after_the_next_good_one(repo, tmp_path, monkeypatch):
    healthy = Trainer.train_step

    def one_bad(self, measure=False):
        alpha, bad = self.model.out_norm.alpha, self.state.step == 1
        with torch.no_grad():
            good = alpha.clone()
            if bad:
                alpha.fill_(float("nan"))
            result = torch.enable_grad()(healthy)(self, measure)
            alpha.copy_(good)
        return result

    monkeypatch.setattr(Trainer, "train_step", one_bad)
    train(from_dict(settings_for(repo, tmp_path / "run", ckpt_freq=2, max_steps=5)))
    names = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["checkpoint_000003", "checkpoint_000004", "checkpoint_000005"]
