"""Files of settings in the words of the plans are read, or answered in one line that says what is meant."""

import logging

import pytest
import yaml

from finetune.common.errors import ConfigError
from finetune.settings.command_line import load_args, parse_with_sources, shown_settings, wants_settings_shown
from finetune.settings.parsing import flat
from finetune.settings.plan_words import in_our_words, with_kind_settled
from finetune.settings.record import from_dict, to_dict
from finetune.training.__main__ import main

HYBRID = {
    "enable": True,
    "layers": "1,5,10",
    "base_lr": 1.0,
    "mini_batch_size": 16,
    "persistent_states": True,
    "initial_gating_alpha": 0.1,
}
"""As the second of the plans has it."""


def write(tmp_path, **content):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        {"ttt": {"enable": True, "chunk_size": 64, "layers": "1,3"}},
        {"ttt": {"enabled": True, "chunk_size": 64, "layers": "1,3"}},
        {"ttt_enable": True, "ttt_chunk_size": 64, "ttt_layers": "1,3"},
        {"ttt_enabled": True, "ttt": {"chunk_size": 64, "layers": "1,3"}},
        {"ttt.enabled": True, "ttt.chunk_size": 64, "ttt.layers": "1,3"},
        {"ttt": {"enable": True, "enabled": True, "chunk_size": 64, "layers": "1,3"}, "ttt_chunk_size": 64},
    ],
)
def test_flat_or_nested_old_or_new_it_is_the_same(tmp_path, content):
    ttt = load_args(write(tmp_path, **content)).ttt
    assert (ttt.enabled, ttt.chunk_size, ttt.layers) == (True, 64, "1,3")
    assert from_dict(content).ttt == ttt


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"ttt": {"enable": True, "enabled": False}}, "ttt.enable=True: contradicts ttt.enabled=False"),
        ({"ttt": {"chunk_size": 8}, "ttt_chunk_size": 64}, "ttt_chunk_size=64: contradicts ttt.chunk_size=8"),
        ({"ttt": {"persistent_states": "often"}}, "ttt.persistent_states='often': must be true or false"),
        ({"ttt": {"enable": True, "base_lr": 1.0, "chunk_size": 64}}, "belongs to TTT-MLP (ttt.kind: mlp), and"),
        (
            {"ttt": {"kind": "in_place", "base_lr": 1.0}},
            "it belongs to TTT-MLP (ttt.kind: mlp) and has no counterpart in In-",
        ),
        ({"ttt": {"kind": "mlp", "learning_rate": 1e-3}}, "it belongs to In-Place TTT (ttt.kind: in_place) and has no"),
        ({"ttt": {"enable": True, "mini_batch_size": 8, "learning_rate": 1e-3}}, "to In-Place TTT (ttt.kind: in"),
    ],
)
def test_what_says_two_things_is_refused_in_one_line(tmp_path, content, said):
    path = write(tmp_path, **content)
    with pytest.raises(ConfigError) as error:
        load_args(path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("value", [True, False])
def test_persistent_states_is_answered_in_a_line(tmp_path, value, caplog):
    with caplog.at_level(logging.INFO):
        args = load_args(write(tmp_path, ttt={"enabled": True, "persistent_states": value}))
    [line] = [record.getMessage() for record in caplog.records if "persistent_states" in record.getMessage()]
    assert line.startswith(f"ttt.persistent_states={str(value).lower()}: nothing depends on it; a stream always")
    assert args == load_args(write(tmp_path, ttt={"enabled": True}))


def test_keys_of_ttt_mlp_alone_tell_the_kind_and_never_become_a_rate_of_in_place():
    content, notes = in_our_words({"ttt": HYBRID})
    settled, told = with_kind_settled(content)
    assert settled["ttt"] == {
        "enabled": True,
        "kind": "mlp",
        "layers": "1,5,10",
        "base_lr": 1.0,
        "mini_batch_size": 16,
        "initial_gating_alpha": 0.1,
    }
    assert "learning_rate" not in settled["ttt"]
    assert told == [
        "ttt.kind=mlp: taken from ttt.base_lr, ttt.mini_batch_size, ttt.initial_gating_alpha, which TTT-MLP alone has."
    ]
    assert len(notes) == 1


def test_without_such_keys_or_with_a_kind_nothing_is_told():
    for ttt in ({"enabled": True}, {"kind": "mlp", "base_lr": 0.1}, {"enabled": True, "base_lr": None}, None, 3):
        assert with_kind_settled({"ttt": ttt}) == ({"ttt": ttt}, [])


def test_the_settings_are_shown_with_their_sources(tmp_path):
    path = write(tmp_path, run_dir="runs/a", training_mode="lora", lora={"rank": 4}, wandb={"key": "secret"})
    args, sources = parse_with_sources([str(path), "--optim.lr", "1e-5", "--do_eval"])
    assert sources["optim.lr"] == sources["do_eval"] == "command line"
    assert sources["run_dir"] == sources["lora.rank"] == str(path)
    assert sources["lora.enable"] == "training_mode"
    assert sources["seed"] == "default"
    assert sources.keys() == flat(to_dict(args)).keys()
    table = shown_settings(flat(to_dict(args)), sources)
    assert "secret" not in table
    [line] = [line for line in table.splitlines() if line.startswith("optim.lr")]
    assert line.split() == ["optim.lr", "1e-05", "command", "line"]


@pytest.mark.parametrize("option", ["--show-settings", "--show_settings"])
def test_the_program_shows_them_and_does_nothing_else(tmp_path, capsys, option):
    path = write(tmp_path, run_dir=str(tmp_path / "run"), ttt={"enable": True})
    assert main([str(path), option, "--max_steps=7"], prog="train.py") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["key", "value", "source"]
    assert [line.split() for line in lines if line.startswith("ttt.enabled")] == [["ttt.enabled", "true", str(path)]]
    assert [line.split() for line in lines if line.startswith("max_steps")] == [["max_steps", "7", "command", "line"]]
    assert list(tmp_path.iterdir()) == [path]
    assert wants_settings_shown(["a", option]) == (True, ["a"])
    assert main([str(path), option, "--max_stesp=7"], prog="train.py") == 2
