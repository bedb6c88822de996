"""Each kind of memory has settings of its own: those of the other are refused, and nowhere written or compared."""

import pytest

from finetune.common.errors import ConfigError
from finetune.settings.parsing import build
from finetune.settings.record import from_dict, to_dict
from finetune.settings.schema import TrainArgs
from finetune.settings.validation import unusual_settings, validate

MLP = {"enabled": True, "kind": "mlp"}


def train_args(tmp_path, ttt: dict, **settings) -> TrainArgs:
    (tmp_path / "train.jsonl").touch()
    data = {"train_data": str(tmp_path / "train.jsonl")}
    return build(TrainArgs, {"data": data, "run_dir": str(tmp_path / "run"), "ttt": ttt, **settings})


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    ("kind", "key", "values"),
    [
        ("mlp", "chunk_size", (256, 64)),
        ("mlp", "learning_rate", (1e-3, 0.1)),
        ("mlp", "layer_frequency", (6, 2)),
        ("mlp", "start_layer", (5, 0)),
        ("mlp", "conv_kernel_size", (2, 3)),
        ("mlp", "conv_depthwise", (True, False)),
        ("mlp", "target", ("token_embeddings", "hidden_states")),
        ("mlp", "delta_clip", (None, 1.0)),
        ("mlp", "decay", (1.0, 0.9)),
        ("mlp", "update", ("hebbian", "residual")),
        ("mlp", "target_gain", (1.0, 2.0)),
        ("mlp", "train_w_down", (True, False)),
        ("mlp", "init_target", ("identity", "readout")),
        ("in_place", "base_lr", (1.0, 0.1)),
        ("in_place", "mini_batch_size", (16, 8)),
        ("in_place", "initial_gating_alpha", (0.0, 0.1)),
        ("in_place", "scan_checkpoint_group_size", (8, 4)),
    ],
)
def test_a_key_of_the_other_kind_is_refused_in_one_line_also_with_its_default(kind, key, values, value):
    given = values[0] if value else values[1]
    with pytest.raises(ConfigError) as error:
        build(TrainArgs, {"ttt": {"enabled": True, "kind": kind, key: given}})
    text = str(error.value)
    assert text.startswith(f"ttt.{key}={given!r}: not with ttt.kind=")
    assert kind in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("mini_batch_size", 0, "a whole number from 1"),
        ("base_lr", 0, "a positive number"),
        ("initial_gating_alpha", float("nan"), "a number from"),
        ("scan_checkpoint_group_size", -1, "a whole number from 0"),
        ("kind", "hybrid", "'in_place' or 'mlp'"),
    ],
)
def test_what_no_kind_allows_is_refused_in_one_line(key, value, allowed):
    with pytest.raises(ConfigError) as error:
        build(TrainArgs, {"ttt": {**MLP, key: value}})
    assert str(error.value).startswith(f"ttt.{key}=")
    assert allowed in str(error.value)


@pytest.mark.parametrize("ttt", [{}, {"enabled": True, "chunk_size": 64}, MLP, {**MLP, "base_lr": 0.1, "layers": [1]}])
def test_what_a_run_records_reads_back_as_it_was_and_names_no_setting_of_the_other_kind(ttt):
    args = build(TrainArgs, {"ttt": ttt})
    recorded = to_dict(args)
    assert from_dict(recorded) == args
    assert ("base_lr" in recorded["ttt"]) == (args.ttt.kind == "mlp")
    assert ("train_w_down" in recorded["ttt"]) == ("chunk_size" in recorded["ttt"]) == (args.ttt.kind == "in_place")


def test_a_sequence_may_be_shorter_than_a_mini_batch(tmp_path):
    args = train_args(tmp_path, {**MLP, "mini_batch_size": 64}, duration_sec=0.8)
    validate(args)
    assert not [text for text in unusual_settings(args) if "chunk" in text]


def test_a_control_without_anything_to_train_is_refused(tmp_path):
    args = train_args(tmp_path, {"kind": "mlp", "as_control": True})
    with pytest.raises(ConfigError, match="nothing would be trained"):
        validate(args)
