"""A checkpoint whose config.json says nothing of TTT takes it from its training, then from the YAML."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from finetune.checkpoint.saved import open_checkpoint
from finetune.checkpoint.verify import refuse_broken
from finetune.common.errors import ConfigError
from finetune.doctor.__main__ import main as doctor
from finetune.evaluation.__main__ import main
from finetune.evaluation.settings_in_force import parse_command_line
from finetune.export.export import export
from finetune.settings.commands import ExportArgs
from tests.support.loading import logits
from tests.support.saved_runs import TTT, copy_run
from tests.support.tiny_repository import DATA

CONFIG = {"ttt_enabled": True, "ttt_layers": [1, 3], "ttt_chunk_size": 8, "ttt_learning_rate": 0.03}


@pytest.fixture
def folder(saved_run, tmp_path) -> Path:
    """The `consolidated` of a run with TTT, whose config.json lost all that it said of TTT."""
    run = copy_run(saved_run("full"), tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "checkpoint_000001")
    folder = run / "checkpoints" / "checkpoint_000002" / "consolidated"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("ttt_")}))
    (folder / "SHA256SUMS").unlink()
    return folder


def write_training(folder: Path, content: dict | None) -> None:
    """Replaces training_config.json; None removes it."""
    path = folder / "training_config.json"
    path.unlink()
    if content is not None:
        path.write_text(json.dumps(content))


def parse(folder: Path, *words: str):
    return parse_command_line([f"--checkpoint_dir={folder}", f"--data.eval_data={DATA}/eval.jsonl", *words])


def config_file(tmp_path, stock_repo, **ttt) -> str:
    path = tmp_path / "any.yaml"
    path.write_text(yaml.safe_dump({"moshi_paths": {"hf_repo_id": str(stock_repo)}, "ttt": ttt}))
    return f"--config={path}"


def in_force(settings) -> dict:
    return {key: settings.checkpoint.config[key] for key in CONFIG}


def test_from_the_training_that_train_py_recorded(folder):
    settings = parse(folder)
    assert in_force(settings) == CONFIG
    assert settings.sources["ttt.chunk_size"] == settings.sources["ttt.layers"] == "training_config.json"
    refuse_broken(settings.checkpoint, "checkpoint_dir")


def test_from_the_flat_file_of_the_plans_in_its_words_before_the_yaml(folder, tmp_path, stock_repo, caplog):
    ttt = {"enable": True, "layers": "1,3", "chunk_size": 8, "learning_rate": 0.03, "persistent_states": True}
    plan = {"ttt": ttt, "batch_size": 1, "duration_sec": 100.0, "full_finetuning": True, "something_else": [1]}
    write_training(folder, plan | {"param_dtype": "float32"})
    with caplog.at_level(logging.INFO):
        settings = parse(folder, config_file(tmp_path, stock_repo, enabled=True, layers=[0], chunk_size=4))
    assert in_force(settings) == CONFIG | {"ttt_layers": "1,3"}
    assert settings.sources["ttt.layers"] == "training_config.json"
    assert settings.args.param_dtype == "float32"
    assert settings.args.eval_batch_size == 1
    assert "ttt.persistent_states=true: nothing depends on it" in caplog.text
    refuse_broken(settings.checkpoint, "checkpoint_dir")


def test_then_from_the_yaml_and_the_command_line_before_both(folder, tmp_path, stock_repo):
    write_training(folder, None)
    yaml_file = config_file(tmp_path, stock_repo, enable=True, layers=[1, 3], chunk_size=4, learning_rate=0.03)
    settings = parse(folder, yaml_file, "--ttt.chunk_size=8")
    assert in_force(settings) == CONFIG
    assert settings.sources["ttt.chunk_size"] == "command line"
    assert settings.sources["ttt.learning_rate"] == str(tmp_path / "any.yaml")
    assert settings.sources["ttt.decay"] == "default"
    refuse_broken(settings.checkpoint, "checkpoint_dir")
    words = ("--ttt.enabled", "--ttt.layers=1,3", "--ttt.chunk_size=8", "--ttt.learning_rate=0.03")
    alone = parse(folder, *words, f"--moshi_paths.hf_repo_id={stock_repo}")
    assert in_force(alone) == CONFIG | {"ttt_layers": "1,3"}


@pytest.mark.parametrize(
    ("ttt", "said"),
    [
        ({"enabled": True, "layers": [1, 2]}, "target generators in layers 1, 3"),
        ({"enabled": True, "layers": [1, 3], "conv_kernel_size": 5}, "has 2 taps"),
        ({"enabled": False}, "target generators in layers 1, 3"),
    ],
)
def test_what_the_weights_contradict_is_refused(folder, tmp_path, stock_repo, capsys, ttt, said):
    write_training(folder, None)
    words = [f"--checkpoint_dir={folder}", f"--data.eval_data={DATA}/eval.jsonl", f"--out_dir={tmp_path / 'out'}"]
    assert main([*words, config_file(tmp_path, stock_repo, **ttt)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("python -m")]
    assert said in line
    assert not (tmp_path / "out").exists()


def test_what_config_json_says_comes_before_the_training_and_the_yaml(saved_run, tmp_path, stock_repo):
    settings = parse(saved_run("full"), config_file(tmp_path, stock_repo, enabled=True, layers=[0], chunk_size=4))
    assert in_force(settings) == CONFIG
    assert settings.sources["ttt.layers"] == "config.json"
    with pytest.raises(ConfigError, match=r"ttt.layers='0': the weights were trained with"):
        parse(saved_run("full"), "--ttt.layers=0")


def test_an_export_and_the_doctor_complete_it_too(folder, saved_run, tmp_path, patched, capsys):
    assert doctor([str(folder), "--expect-layers=1,3"]) == 0
    assert "layers 1, 3 expected, TTT in layers 1, 3" in capsys.readouterr().out
    out = export(ExportArgs(str(folder), str(tmp_path / "out")))
    assert json.loads((out / "config.json").read_text())["ttt_chunk_size"] == TTT["chunk_size"]
    from moshi_patch import load_checkpoint_info

    whole = load_checkpoint_info(out).get_moshi(dtype=torch.float32)
    again = export(ExportArgs(str(saved_run("full")), str(tmp_path / "again")))
    assert torch.equal(logits(whole), logits(load_checkpoint_info(again).get_moshi(dtype=torch.float32)))


def test_an_export_of_the_flat_file_of_the_plans_is_made(folder, tmp_path, stock_repo):
    ttt = {"enable": True, "layers": "1,3", "chunk_size": 8}
    write_training(folder, {"ttt": ttt, "param_dtype": "float32", "moshi_paths": {"hf_repo_id": str(stock_repo)}})
    out = export(ExportArgs(str(folder), str(tmp_path / "out")))
    assert open_checkpoint(out).config["ttt_layers"] == "1,3"


def test_batch_size_is_eval_batch_size(saved_run, capsys):
    assert parse(saved_run("full"), "--batch_size", "4").args.eval_batch_size == 4
    assert parse(saved_run("full"), "--batch_size=4", "--eval_batch_size=4").args.eval_batch_size == 4
    for words, said in (
        (("--batch_size=4", "--eval_batch_size=2"), "batch_size=4: contradicts eval_batch_size=2"),
        (("--batch_size=0",), "eval_batch_size=0: must be"),
        (("--batch_size=many",), "batch_size='many': must be a whole number"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse(saved_run("full"), *words)


def test_the_program_shows_its_settings_and_does_nothing_else(saved_run, tmp_path, capsys):
    words = [f"--checkpoint_dir={saved_run('full')}", f"--data.eval_data={DATA}/eval.jsonl"]
    assert main([*words, f"--out_dir={tmp_path / 'out'}", "--show-settings", "--batch_size=3"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["key", "value", "source"]
    assert ["eval_batch_size", "3", "command", "line"] in lines
    assert ["ttt.chunk_size", "8", "config.json"] in lines
    assert ["param_dtype", "float32", "training_config.json"] in lines
    assert ["segment_steps", "2048", "default"] in lines
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("expected", "code", "said"),
    [
        ("1,3", 0, "ok expected layers: layers 1, 3 expected, TTT in layers 1, 3"),
        ("[3, 1]", 0, "layers 1, 3 expected"),
        ("2", 0, "2 layers expected, TTT in layers 1, 3"),
        ("5,11,17", 1, "FAILED expected layers: layers 5, 11, 17 expected, TTT in layers 1, 3"),
        ("1", 1, "FAILED expected layers: 1 layer expected"),
        ("[1]", 1, "FAILED expected layers: layer 1 expected"),
    ],
)
def test_the_doctor_is_told_which_layers_to_expect(saved_run, capsys, patched, expected, code, said):
    assert doctor([str(saved_run("full")), f"--expect-layers={expected}"]) == code
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--expect-layers=1,3"], ["x", "--expect-layers=some"], ["x", "--expect-layers="]])
def test_a_doctor_asked_for_nothing_sensible_says_so_in_one_line(capsys, words):
    assert doctor(words) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_tensors_of_ttt_are_counted_when_they_are_loaded(saved_run, caplog, stock_repo, patched):
    from finetune.checkpoint.saved import load_model, model_paths

    saved = open_checkpoint(saved_run("full"))
    with caplog.at_level(logging.INFO):
        load_model(saved, model_paths(saved), torch.device("cpu"), torch.float32)
    width = saved.config["dim"]
    assert f"4 tensors of TTT, {2 * 4 * (width * width + 2 * width):,} bytes" in caplog.text
