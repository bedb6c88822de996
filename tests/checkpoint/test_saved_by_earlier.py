"""What an earlier version saved is resumed, evaluated, exported, examined and begun from as on the day it was saved.

The runs are described in `runs_of_19e7289/README.md`. They have no checksums of their training states, and name their
adapters by a path that was true on another machine.
"""

import json
import logging
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import moshi_patch
from finetune.doctor.__main__ import main as doctor
from finetune.evaluation.__main__ import main as evaluate
from finetune.export.__main__ import main as export
from finetune.training.__main__ import main as train
from tests.support.tiny_repository import DATA

STEP = "checkpoints/checkpoint_000002"
WEIGHTS = {"full": "consolidated.safetensors", "adapters": "lora.safetensors"}


@pytest.fixture(autouse=True)
def _patched(patched):
    """Stock again afterwards: training installs the patch."""


@pytest.fixture
def earlier(tmp_path, stock_repo):
    """The folder with the runs `full` and `adapters`, and `base`."""
    with tarfile.open(Path(__file__).parent / "runs_of_19e7289" / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    shutil.copy(stock_repo / "mimi.safetensors", tmp_path / "base")
    shutil.copy(stock_repo / "mimi_config.json", tmp_path / "base")
    return tmp_path


@pytest.mark.parametrize("mode", WEIGHTS)
def test_a_run_goes_on_from_the_step_it_was_saved_at_with_a_warning(earlier, mode, caplog, monkeypatch):
    monkeypatch.chdir(earlier)  # the run names its base model, and itself, from there
    with caplog.at_level(logging.WARNING):
        assert train([f"{mode}/args.yaml", "--resume", f"--data.train_data={DATA / 'train.jsonl'}"]) == 0
    assert "has no checksums of its training state; a flipped bit would not be seen" in caplog.text
    metrics = [json.loads(line) for line in Path(mode, "metrics.train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    before, after = (
        load_file(Path(mode, f"checkpoints/checkpoint_00000{n}/consolidated", WEIGHTS[mode])) for n in (2, 4)
    )
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(torch.allclose(before[name], after[name], atol=0.05) for name in after)  # two small steps from there


@pytest.mark.parametrize("mode", WEIGHTS)
def test_a_checkpoint_is_evaluated(earlier, mode):
    (earlier / "eval.jsonl").write_text(json.dumps({"path": str(DATA / "boat.wav"), "duration": 11.0}))
    words = [f"--checkpoint_dir={earlier / mode}", f"--data.eval_data={earlier / 'eval.jsonl'}", "--max_minutes=0.1"]
    assert evaluate([*words, f"--moshi_paths.hf_repo_id={earlier / 'base'}", f"--out_dir={earlier / 'out'}"]) == 0
    overall = json.loads((earlier / "out" / "eval.json").read_text())["standard"]["overall"]
    assert all(0 < row["loss"] < 20 for row in overall.values())
    assert overall["updates on"]["loss"] != overall["updates off"]["loss"]


@pytest.mark.parametrize("mode", WEIGHTS)
def test_a_checkpoint_is_examined_exported_and_served(earlier, mode, capsys):
    base = f"--base={earlier / 'base'}"
    assert doctor([str(earlier / mode), base]) == 0
    assert "warning training state" in capsys.readouterr().out
    assert export([str(earlier / mode), str(earlier / "out"), "--with-base", base]) == 0
    saved, exported = (
        load_file(place / WEIGHTS[mode]) for place in (earlier / mode / STEP / "consolidated", earlier / "out")
    )
    assert all(torch.equal(saved[name], exported[name]) for name in saved)
    model = moshi_patch.load_checkpoint_info(earlier / "out").get_moshi(dtype=torch.float32)
    assert model.ttt_config.chunk_size == 8


@pytest.mark.parametrize("mode", WEIGHTS)
def test_a_new_run_begins_from_a_checkpoint(earlier, mode, monkeypatch):
    monkeypatch.chdir(earlier)
    words = [f"{mode}/args.yaml", f"--data.train_data={DATA / 'train.jsonl'}", "--run_dir=new", "--max_steps=1"]
    assert train([*words, f"--init_from={mode}"]) == 0
    assert Path("new/checkpoints/checkpoint_000001").is_dir()
