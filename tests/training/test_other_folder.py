"""A run whose settings name its base model by a relative path works from another working directory."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import yaml

from finetune.doctor.__main__ import main as doctor
from finetune.evaluation.__main__ import main as evaluate
from finetune.export.__main__ import main as export
from finetune.training.__main__ import main as train
from tests.support.tiny_repository import DATA, build_repo
from tests.support.training_runs import metrics, settings_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A project with a base model, data and a run with adapters, all named by relative paths."""
    folder = tmp_path_factory.mktemp("trained") / "project"
    folder.mkdir()
    build_repo(folder / "repo", ttt_enabled=False)
    shutil.copytree(DATA, folder / "data")
    settings = settings_for("repo", "runs/one", max_steps=2, sample_freq=0)
    settings["data"] = {"train_data": "data/train.jsonl", "eval_data": "data/eval.jsonl"}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(["run.yaml"]) == 0
    return folder


@pytest.fixture(params=["where it was", "moved as a whole"])
def run(request, trained, tmp_path, monkeypatch, patched) -> Path:
    """That run, while the working directory is another."""
    monkeypatch.chdir(tmp_path)
    if request.param == "where it was":
        return trained / "runs" / "one"
    shutil.copytree(trained, tmp_path / "moved")
    for file in (tmp_path / "moved").rglob("training_config.json"):  # as if the first place were not there any more
        content = json.loads(file.read_text())
        assert content["working_directory"] == str(trained)
        file.write_text(json.dumps(content | {"working_directory": "/not/here"}))
        (file.parent / "SHA256SUMS").unlink()
    return tmp_path / "moved" / "runs" / "one"


def test_it_is_evaluated_checked_and_exported_from_another_folder(run, tmp_path, capsys):
    base = str(run.parents[1] / "repo")
    assert evaluate(["--checkpoint_dir", str(run), f"--out_dir={tmp_path}/results", "--max_minutes=0.1"]) == 0
    table = json.loads((tmp_path / "results" / "eval.json").read_text())["settings"]
    assert table["moshi_paths.hf_repo_id"]["value"] == base
    assert table["data.eval_data"]["value"] == str(run.parents[1] / "data" / "eval.jsonl")
    assert doctor([str(run)]) == 0
    assert export([str(run), str(tmp_path / "out"), "--merge"]) == 0
    assert str(run.parents[1]) not in (tmp_path / "out" / "training_config.json").read_text()
    assert "working_directory" not in (tmp_path / "out" / "training_config.json").read_text()


def test_it_is_resumed_with_its_own_args_yaml_from_another_folder(trained, tmp_path, monkeypatch, patched, caplog):
    shutil.copytree(trained, tmp_path / "project")
    run = tmp_path / "project" / "runs" / "one"
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert train([str(run / "args.yaml"), "--resume", "--max_steps=4"]) == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    assert "Resumed at step 2" in caplog.text
    assert "data.train_data is" not in caplog.text
    assert not (tmp_path / "runs").exists()
