"""A control is the same run without TTT: same data, same trainable W_down, its own folder, never trained twice."""

import logging
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file

import moshi_patch
from finetune.common.distributed import Context
from finetune.common.errors import ConfigError
from finetune.common.files import read_json
from finetune.doctor.__main__ import main as doctor
from finetune.evaluation.__main__ import main as evaluate
from finetune.export.__main__ import main as export
from finetune.model.adapters import lora_parameters
from finetune.settings.record import from_dict
from finetune.training import trainer
from finetune.training.build_model import build_model
from finetune.training.control import compared, control_args
from finetune.training.signals import Stopped
from finetune.training.trainer import train
from tests.support.tiny_repository import DATA
from tests.support.training_runs import metrics, settings_for

pytestmark = pytest.mark.slow

DOWN = "transformer.layers.{}.gating.linear_out.weight"


def settings(repo: Path, run: Path, **changes) -> dict:
    given = {"do_eval": True, "eval_freq": 2, "ckpt_freq": 2, "max_steps": 4, "sample_freq": 0, "control": True}
    return settings_for(repo, run, **given | changes)


@pytest.fixture(autouse=True)
def _patched(patched):
    """Training installs the patch for good; here it is gone after each test."""


@pytest.fixture(scope="module")
def trained(stock_repo, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run with its control, and what it said at the end."""
    run = tmp_path_factory.mktemp("trained") / "run"
    return run, train(from_dict(settings(stock_repo, run)))


def newest(run: Path) -> Path:
    return run / "checkpoints" / "checkpoint_000004" / "consolidated"


def test_both_hear_the_same_and_begin_at_the_same_weights(trained):
    run, _ = trained
    first, control = metrics(run)[0], metrics(run / "control")[0]
    for name in ("loss", "text_loss", "audio_loss"):
        assert control[name] == first[name]
    assert [row["step"] for row in metrics(run / "control")] == [1, 2, 3, 4]
    assert metrics(run / "control")[3]["loss"] != metrics(run)[3]["loss"]


def test_the_control_trains_w_down_of_the_same_layers_and_has_no_ttt(trained, stock_repo):
    run, _ = trained
    base, ours, theirs = (
        load_file(path)
        for path in (
            stock_repo / "model.safetensors",
            newest(run) / "lora.safetensors",
            newest(run / "control") / "lora.safetensors",
        )
    )
    assert theirs.keys() == {name for name in ours if "target_generator" not in name}
    assert {name for name in theirs if name.endswith("linear_out.weight")} == {DOWN.format(1), DOWN.format(3)}
    for layer in (1, 3):
        assert not torch.equal(theirs[DOWN.format(layer)], base[DOWN.format(layer)])
    assert read_json(newest(run / "control") / "config.json")["ttt_enabled"] is False


def test_the_control_is_served_by_stock_moshi(trained, stock_repo):
    run, _ = trained
    config = read_json(newest(run / "control") / "config.json")
    kwargs = {key: value for key, value in config.items() if not key.startswith("ttt_") and not key.endswith("_name")}
    moshi_patch.uninstall()
    model = loaders.get_moshi_lm(
        stock_repo / "model.safetensors",
        {key: value for key, value in kwargs.items() if key not in ("model_type", "lm_gen_config")},
        dtype=torch.float32,
        lora_weights=newest(run / "control") / "lora.safetensors",
        fuse_lora=False,
    )
    saved = load_file(newest(run / "control") / "lora.safetensors")
    assert torch.equal(
        model.get_parameter(DOWN.format(1).replace(".weight", ".frozen_W.weight")), saved[DOWN.format(1)]
    )


def test_the_difference_is_that_of_the_two_losses_at_the_same_step(trained):
    run, said = trained
    pairs = list(zip(metrics(run, "eval"), metrics(run / "control", "eval"), strict=True))
    assert [entry["step"] for entry in compared(run)] == [2, 4]
    for (ours, theirs), entry in zip(pairs, compared(run), strict=True):
        assert theirs["control_difference"] == pytest.approx(ours["loss"] - theirs["loss"], abs=1e-5)
        assert entry["control_difference"] == pytest.approx(theirs["control_difference"])
        assert "control_difference_error" not in theirs, "one recording"
    assert "trained without TTT  best " in said
    assert "from fewer than five held-out recordings" in said


def test_what_is_printed_at_the_end_runs_as_printed(trained, capsys):
    run, said = trained
    programs = {"eval_from_checkpoint.py": evaluate, "doctor": doctor, "export": export}
    ran = []
    for line in (line.strip() for line in said.splitlines() if line.startswith("  ")):
        words = shlex.split(line)
        for name, main in programs.items():
            place = next((i for i, word in enumerate(words) if word.endswith(name)), None)
            if place is not None:
                assert main(words[place + 1 :]) == 0, capsys.readouterr()
                ran.append(name)
    assert ran == ["eval_from_checkpoint.py", "doctor", "export"]
    assert (run / "export_checkpoint_000004").is_dir()


def test_a_control_that_is_done_is_not_trained_again(trained, stock_repo, monkeypatch):
    run, _ = trained
    before = (run / "control" / "metrics.train.jsonl").read_text()
    built = []
    plain = trainer.build_model
    monkeypatch.setattr(trainer, "build_model", lambda args, ctx: (built.append(args.run_dir), plain(args, ctx))[1])
    said = train(from_dict(settings(stock_repo, run, checkpoint={"resume": True})))
    assert built == [str(run)]
    assert (run / "control" / "metrics.train.jsonl").read_text() == before
    assert "trained without TTT" in said


def test_a_control_that_was_interrupted_goes_on_as_if_it_had_not_been(trained, stock_repo, tmp_path, monkeypatch):
    plain = trainer.update

    def signalled(state, args, *rest, **kwargs):
        if args.ttt.as_control and state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(state, args, *rest, **kwargs)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", signalled)
        with pytest.raises(
            Stopped, match=r"control/checkpoints/checkpoint_000003\. Continue with: .*run/args.yaml --resume"
        ):
            train(from_dict(settings(stock_repo, run)))
    train(from_dict(settings(stock_repo, run, checkpoint={"resume": True})))
    for kind, names in (("train", ("loss", "grad_norm")), ("eval", ("loss", "control_difference"))):
        expected = metrics(trained[0] / "control", kind)
        assert [[row[name] for name in names] for row in metrics(run / "control", kind)] == [
            [row[name] for name in names] for row in expected
        ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ttt": {}}, "control=True: there is nothing to control"),
        (
            {"lora": {}, "ttt": {"enabled": True, "layers": [1], "chunk_size": 16, "train_w_down": False}},
            "control=True: without TTT this run cannot be trained: .*nothing would be trained",
        ),
        (
            {"init_from": "{run}"},
            r"control=True: init_from='.*' was trained with TTT, and .*/control.* is no checkpoint",
        ),
    ],
)
def test_what_has_no_control_is_refused_before_anything_is_changed(trained, stock_repo, tmp_path, changes, named):
    if "init_from" in changes:
        (tmp_path / "earlier").mkdir()
        (tmp_path / "earlier" / "checkpoints").symlink_to(trained[0] / "checkpoints")
        changes = {"init_from": str(tmp_path / "earlier")}
    with pytest.raises(ConfigError, match=named):
        train(from_dict(settings(stock_repo, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


def test_a_base_model_with_ttt_has_no_control(ttt_repo, tmp_path):
    with pytest.raises(ConfigError, match=r"control=True: .*the base model has TTT weights"):
        train(from_dict(settings(ttt_repo, tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_second_stage_begins_its_control_at_the_first_ones(trained, stock_repo, tmp_path, caplog):
    run, _ = trained
    stages = {"max_steps": 1, "data": {"train_data": f"{DATA}/train.jsonl", "eval_data": f"{DATA}/eval.jsonl"}}
    with caplog.at_level(logging.INFO):
        train(from_dict(settings(stock_repo, tmp_path / "second", init_from=str(run), optim={"lr": 1e-9}, **stages)))
    for folder in (run, run / "control"):
        second = tmp_path / "second" / folder.relative_to(run)
        assert metrics(second, "eval")[0]["loss"] == pytest.approx(metrics(folder, "eval")[-1]["loss"], rel=1e-4)


def test_new_adapters_of_both_begin_with_the_same_numbers(stock_repo, tmp_path):
    args = from_dict(settings(stock_repo, tmp_path / "run"))
    ours, theirs = (
        lora_parameters(build_model(one, Context(0, 1, 0, torch.device("cpu"))).model)
        for one in (args, control_args(args))
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
