"""Recorded settings are read again as they were, also from another working directory and after the run was moved."""

import os
from pathlib import Path

import pytest
import yaml

from finetune.settings.command_line import load_args, parse_command_line
from finetune.settings.record import from_dict, to_dict, with_absolute_paths, with_paths_found, working_directories
from finetune.settings.schema import DataArgs, MoshiPaths, TrainArgs


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A working directory with data and a base model."""
    folder = tmp_path / "project"
    (folder / "repo").mkdir(parents=True)
    (folder / "data").mkdir()
    for name in ("data/a.jsonl", "data/b:c.jsonl", "repo/model.safetensors", "start.safetensors"):
        (folder / name).touch()
    monkeypatch.chdir(folder)
    return folder


def settings() -> dict:
    paths = MoshiPaths("repo", "hf://kyutai/x/mimi.safetensors", "file://repo/model.safetensors", "gone.model")
    data = DataArgs("data/a.jsonl:2, data", "data/b:c.jsonl")
    return to_dict(TrainArgs(data, "runs/one", paths, init_from="start.safetensors"))


def test_what_is_there_gets_absolute_paths_and_names_on_the_hub_stay(project):
    before = settings()
    placed = with_absolute_paths(before)
    assert placed["data"]["train_data"] == f"{project}/data/a.jsonl:2, {project}/data"
    assert placed["data"]["eval_data"] == f"{project}/data/b:c.jsonl"
    assert placed["init_from"] == f"{project}/start.safetensors"
    assert placed["run_dir"] == f"{project}/runs/one"
    assert placed["moshi_paths"] == {
        "hf_repo_id": f"{project}/repo",
        "mimi_path": "hf://kyutai/x/mimi.safetensors",
        "moshi_path": f"file://{project}/repo/model.safetensors",
        "tokenizer_path": "gone.model",
        "config_path": None,
    }
    assert before == settings()  # a copy
    hub = with_absolute_paths(to_dict(TrainArgs()))
    assert hub["moshi_paths"]["hf_repo_id"] == "kyutai/moshiko-pytorch-bf16"


def test_relative_paths_are_found_where_the_run_was_started(project, monkeypatch):
    recorded = settings()
    monkeypatch.chdir("/")
    assert with_paths_found(recorded, [Path("/nowhere"), project])["moshi_paths"]["hf_repo_id"] == f"{project}/repo"
    assert with_paths_found(recorded, [Path("/nowhere")]) == recorded
    assert from_dict(with_paths_found(recorded, [project])).data.eval_data == f"{project}/data/b:c.jsonl"


@pytest.mark.parametrize("content", [{}, {"data": None}, {"data": {"train_data": 5}}, {"moshi_paths": "x"}])
def test_what_is_no_settings_is_left_to_those_who_check_it(content):
    assert with_paths_found(content, [Path("/")]) == content


def test_a_moved_run_is_looked_for_beside_its_new_place(project):
    folder = project / "runs" / "one" / "checkpoints" / "checkpoint_000001" / "consolidated"
    folder.mkdir(parents=True)
    recorded = {"training": settings(), "working_directory": "/gone"}
    assert working_directories(recorded, folder) == [Path("/gone"), project]
    assert working_directories({"training": settings() | {"run_dir": "runs/two"}}, folder) == []
    assert working_directories({"training": settings() | {"run_dir": "/runs/one"}}, folder) == []
    assert working_directories({"training": {}, "working_directory": 5}, Path("/")) == []


def test_args_yaml_is_a_configuration_and_belongs_to_its_run_when_it_is_resumed(project, monkeypatch):
    run = project / "runs" / "one"
    (run / "checkpoints").mkdir(parents=True)
    (run / "args.yaml").write_text(yaml.safe_dump(with_absolute_paths(settings())))
    monkeypatch.chdir("/")
    args = load_args(run / "args.yaml")
    assert args == from_dict(with_paths_found(settings(), [project]) | {"run_dir": str(run)})
    run.rename(project / "moved")
    moved = str(project / "moved" / "args.yaml")
    assert parse_command_line([moved, "--resume"]).run_dir == str(project / "moved")
    assert parse_command_line([os.path.relpath(moved), "--resume"]).run_dir == str(project / "moved")
    assert parse_command_line([moved]).run_dir == str(run)
    assert parse_command_line([moved, "--resume", "--run_dir=other"]).run_dir == "other"
