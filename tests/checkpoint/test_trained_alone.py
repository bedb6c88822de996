"""`training_mode: ttt` saves what trained alone; whoever loads it needs the base of the training, and no other."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import moshi_patch
from finetune.checkpoint.saved import load_model, model_paths, open_checkpoint
from finetune.checkpoint.verify import refuse_broken
from finetune.common.errors import ConfigError
from finetune.doctor.__main__ import main as doctor
from finetune.evaluation.__main__ import main as evaluate
from finetune.export.export import export
from finetune.settings.commands import ExportArgs
from finetune.settings.record import from_dict
from finetune.training.build_model import build_model
from finetune.training.trainer import train as train_fully
from moshi_patch.__main__ import main as run_stock
from tests.support.checkpoint_runs import CTX
from tests.support.loading import logits
from tests.support.saved_runs import TTT, copy_run, train
from tests.support.tiny_repository import DATA
from tests.support.training_runs import settings_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _patched(patched):
    """For the models that are built here."""


@pytest.fixture
def run(saved_run, tmp_path) -> Path:
    """A run that trained TTT alone, to change."""
    return copy_run(saved_run("ttt"), tmp_path / "run")


@pytest.fixture(scope="module")
def other_base(stock_repo, tmp_path_factory) -> Path:
    """The base model with one bit flipped in a weight that did not train."""
    folder = tmp_path_factory.mktemp("other") / "repo"
    shutil.copytree(stock_repo, folder)
    weights = load_file(folder / "model.safetensors")
    weights["text_linear.weight"].view(torch.int16)[3, 5] ^= 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def weights_of(run: Path) -> Path:
    return run / "checkpoints" / "checkpoint_000002" / "consolidated" / "ttt.safetensors"


def loaded(run: Path, base: Path | None = None, dtype=torch.float32):
    saved = open_checkpoint(run)
    refuse_broken(saved, "checkpoint_dir")
    return load_model(saved, model_paths(saved, None if base is None else str(base)), CPU, dtype)[0]


def test_it_holds_what_trained_and_the_fingerprint_of_the_rest(run):
    with safe_open(weights_of(run), "pt") as file:
        layers = [f"transformer.layers.{layer}.gating." for layer in (1, 3)]
        keys = [f"target_generator.{key}" for key in moshi_patch.TARGET_KEYS]
        assert set(file.keys()) == {layer + key for layer in layers for key in (*keys, "linear_out.weight")}
        assert file.metadata()["base_dtype"] == "float32"
        assert len(file.metadata()["base_fingerprint"]) == 64
    config = json.loads(weights_of(run).with_name("config.json").read_text())
    assert config["ttt_enabled"] is True
    assert config["lora"] is False


def test_over_its_base_it_is_the_model_that_trained(stock_repo, tmp_path):
    for alone in (True, False):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        train(tmp_path / f"run-{alone}", stock_repo, "ttt", save_adapters=alone)
    ours, theirs = loaded(tmp_path / "run-True"), loaded(tmp_path / "run-False")
    assert open_checkpoint(tmp_path / "run-False").weights.name == "consolidated.safetensors"
    for (name, one), (_, other) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("trained", "used"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_precision_that_it_is_used_in_does_not_matter_to_the_fingerprint(stock_repo, tmp_path, trained, used):
    run = train(tmp_path / "run", stock_repo, "ttt", param_dtype=trained)
    model = loaded(run, dtype=getattr(torch, used))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, used)}


def test_another_base_is_refused_in_one_line_by_whoever_loads_it(run, other_base, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"is not the base model that this was trained over") as error:
        loaded(run, other_base)
    assert "\n" not in str(error.value)
    assert "ttt.safetensors" in str(error.value)

    assert doctor([str(run), f"--base={other_base}"]) == 1
    assert "is not the base model" in capsys.readouterr().out
    assert doctor([str(run)]) == 0
    assert "0 FAILED" in capsys.readouterr().out

    with pytest.raises(ConfigError, match="is not the base model"):
        export(ExportArgs(str(run), str(tmp_path / "out"), base=str(other_base)))
    assert not (tmp_path / "out").exists()

    words = [f"--checkpoint_dir={run}", f"--data.eval_data={DATA}/eval.jsonl", f"--out_dir={tmp_path / 'eval'}"]
    assert evaluate([*words, f"--moshi_paths.hf_repo_id={other_base}"]) == 2
    said = capsys.readouterr().err
    assert "is not the base model" in said
    assert "Traceback" not in said
    assert not (tmp_path / "eval" / "eval.json").exists()


def test_a_run_begins_from_it_over_its_base_alone(run, stock_repo, other_base):
    ttt = {"training_mode": "ttt", "ttt": TTT, "param_dtype": "float32", "init_from": str(run)}
    model = build_model(from_dict(ttt | {"moshi_paths": {"hf_repo_id": str(stock_repo)}}), CTX).model
    for name, value in load_file(weights_of(run)).items():
        assert torch.equal(model.state_dict()[name], value)
    for mode in ({}, {"training_mode": "lora+ttt", "lora": {"rank": 4}}):
        with pytest.raises(ConfigError, match=r"^init_from=.*is not the base model") as error:
            build_model(from_dict(ttt | mode | {"moshi_paths": {"hf_repo_id": str(other_base)}}), CTX)
        assert "\n" not in str(error.value)
    with_adapters = ttt | {"training_mode": "lora+ttt", "lora": {"rank": 4}}
    adapted = build_model(from_dict(with_adapters | {"moshi_paths": {"hf_repo_id": str(stock_repo)}}), CTX).model
    inside = "transformer.layers.1.gating.linear_out.frozen_W.weight"
    held = load_file(weights_of(run))["transformer.layers.1.gating.linear_out.weight"]
    assert torch.equal(adapted.state_dict()[inside], held)


def test_a_run_is_resumed_over_its_base_alone(stock_repo, other_base, tmp_path):
    settings = settings_for(stock_repo, tmp_path / "run", training_mode="ttt", lora={}, max_steps=2)
    train_fully(from_dict(settings))
    resumed = settings | {"max_steps": 3, "checkpoint": {"resume": True}}
    with pytest.raises(ConfigError, match="are not those it was trained on"):
        train_fully(from_dict(resumed | {"moshi_paths": {"hf_repo_id": str(other_base)}}))
    train_fully(from_dict(resumed))
    assert (tmp_path / "run" / "checkpoints" / "checkpoint_000003" / "consolidated" / "ttt.safetensors").is_file()


def test_an_export_of_it_is_a_whole_model_for_stock_programs(run, tmp_path):
    out = export(ExportArgs(str(run), str(tmp_path / "out")))
    whole = moshi_patch.load_checkpoint_info(out).get_moshi(dtype=torch.float32)
    assert torch.equal(logits(whole), logits(loaded(run)))


@pytest.mark.parametrize("option", ["--moshi-weight", "--lora-weight"])
def test_a_stock_program_that_is_given_it_says_in_one_line_what_to_do(run, capsys, option):
    with pytest.raises(SystemExit) as end:
        run_stock(["moshi.server", option, str(weights_of(run))])
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "without its base model" in line
    assert "finetune.export" in line


def test_as_the_base_of_a_training_it_is_refused(run, stock_repo, tmp_path):
    paths = {"hf_repo_id": str(stock_repo), "moshi_path": str(weights_of(run))}
    with pytest.raises(ConfigError, match=r"^moshi_paths.moshi_path=.*without its base model"):
        train_fully(from_dict(settings_for(stock_repo, tmp_path / "next", moshi_paths=paths)))


def test_one_whose_header_lost_the_fingerprint_is_refused(run):
    save_file(load_file(weights_of(run)), weights_of(run), {"format": "pt"})
    weights_of(run).with_name("SHA256SUMS").unlink()
    with pytest.raises(ConfigError, match="no fingerprint of its base model"):
        loaded(run)


def test_what_began_from_other_weights_says_which_base_it_needs(saved_run, stock_repo, tmp_path):
    whole = saved_run("full")
    run = train(tmp_path / "run", stock_repo, "ttt", init_from=str(whole))
    with pytest.raises(ConfigError, match=r"whose base is the model of init_from="):
        loaded(run)
    base = whole / "checkpoints" / "checkpoint_000002" / "consolidated" / "consolidated.safetensors"
    assert torch.isfinite(logits(loaded(run, base))).all()


@pytest.mark.slow
def test_the_control_of_such_a_run_is_trained_and_compared_with(stock_repo, tmp_path, capsys):
    settings = settings_for(stock_repo, tmp_path / "run", training_mode="ttt", lora={}, max_steps=2, do_eval=True)
    train_fully(from_dict(settings | {"control": True}))
    name = "checkpoints/checkpoint_000002/consolidated/ttt.safetensors"
    ours, theirs = load_file(tmp_path / "run" / name), load_file(tmp_path / "run" / "control" / name)
    assert theirs.keys() == {key for key in ours if key.endswith("linear_out.weight")} != set()
    words = [f"--checkpoint_dir={tmp_path / 'run'}", f"--data.eval_data={DATA}/eval.jsonl", "--by_layer"]
    assert evaluate(words) == 0
    page = capsys.readouterr().out
    assert "with TTT - trained without" in page
    assert "layer without updates" in page
    assert doctor([str(tmp_path / "run" / "control")]) == 0
