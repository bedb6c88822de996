"""Bad settings: one ValueError each, naming argument, value and what is allowed, before anything is built."""

import math
import subprocess
import sys

import pytest
import torch
from moshi.models.lm import LMModel

import moshi_patch
from moshi_patch import TTTConfig
from tests.support.models import TINY, TTT, TTT_MLP, tiny_model
from tests.support.tiny_repository import ENVIRONMENT, ROOT

BAD = [
    ({"ttt_chunck_size": 4}, "ttt_chunck_size=4", "ttt_chunk_size"),
    ({"ttt_chunk_size": 0}, "ttt_chunk_size=0", "a whole number from 1 to "),
    ({"ttt_chunk_size": 2.5}, "ttt_chunk_size=2.5", "a whole number from 1 to "),
    ({"ttt_chunk_size": True}, "ttt_chunk_size=True", "a whole number from 1 to "),
    ({"ttt_layers": "99"}, "ttt_layers='99'", "indices from 0 to 3"),
    ({"ttt_layers": "1,x"}, "ttt_layers='1,x'", "list of layer indices"),
    ({"ttt_layers": [1, -1]}, "ttt_layers=[1, -1]", "list of layer indices"),
    ({"ttt_layers": []}, "ttt_layers=[]", "list of layer indices"),
    ({"ttt_layers": ""}, "ttt_layers=''", "list of layer indices"),
    ({"ttt_layers": 3}, "ttt_layers=3", "list of layer indices"),
    ({"ttt_layers": None}, "ttt_start_layer=5", "from 0 to 3"),
    ({"ttt_layers": None, "ttt_layer_frequency": 0}, "ttt_layer_frequency=0", "a whole number from 1 to "),
    ({"ttt_start_layer": -1}, "ttt_start_layer=-1", "a whole number from 0 to 10000"),
    ({"ttt_learning_rate": -1e-3}, "ttt_learning_rate=-0.001", "a positive number, at most 1e+06"),
    ({"ttt_learning_rate": math.nan}, "ttt_learning_rate=nan", "a positive number, at most 1e+06"),
    ({"ttt_learning_rate": "fast"}, "ttt_learning_rate='fast'", "a positive number, at most 1e+06"),
    ({"ttt_conv_kernel_size": 0}, "ttt_conv_kernel_size=0", "a whole number from 1 to "),
    ({"ttt_conv_depthwise": "no"}, "ttt_conv_depthwise='no'", "True or False"),
    ({"ttt_target": "tokens"}, "ttt_target='tokens'", "'token_embeddings' or 'hidden_states'"),
    ({"ttt_learning_rate": 10**400}, "ttt_learning_rate=1000", "a positive number, at most 1e+06"),
    ({"ttt_layers": "1," + "9" * 50}, "ttt_layers='1,9999", "list of layer indices"),
    ({"num_layers": "4"}, "num_layers='4'", "positive whole number"),
    ({"ttt_delta_clip": 0.0}, "ttt_delta_clip=0.0", "positive number, at most 1e+09, or None"),
    ({"ttt_delta_clip": math.inf}, "ttt_delta_clip=inf", "positive number, at most 1e+09, or None"),
    ({"ttt_decay": 0}, "ttt_decay=0", "(0, 1]"),
    ({"ttt_decay": 1.5}, "ttt_decay=1.5", "(0, 1]"),
    ({"ttt_update": "delta"}, "ttt_update='delta'", "'hebbian' or 'residual'"),
    ({"ttt_update": None}, "ttt_update=None", "'hebbian' or 'residual'"),
    ({"ttt_target_gain": 0}, "ttt_target_gain=0", "a positive number, at most 1e+06"),
    ({"ttt_target_gain": math.inf}, "ttt_target_gain=inf", "a positive number, at most 1e+06"),
    ({"ttt_target_gain": True}, "ttt_target_gain=True", "a positive number, at most 1e+06"),
    (
        {"ttt_update": "residual", "ttt_learning_rate": math.nan},
        "ttt_learning_rate=nan",
        "a positive number, at most 1e+06",
    ),
    ({"ttt_update": "residual", "ttt_learning_rate": 1e-40}, "ttt_learning_rate=1e-40", "at least 1e-12 with"),
    ({"ttt_update": "residual", "ttt_target_gain": 1e30}, "ttt_target_gain=1e+30", "a positive number, at most 1e+06"),
    ({"ttt_update": "residual", "ttt_delta_clip": 1.0}, "ttt_delta_clip=1.0", 'None with ttt_update="residual"'),
    ({"ttt_target_gain": 1e5, "dtype": torch.float16}, "ttt_target_gain=100000.0", "at most 65504 with dtype=torch.fl"),
    ({"ttt_enabled": "yes"}, "ttt_enabled='yes'", "True or False"),
    ({"gating": "none"}, "gating='none'", "silu"),
    ({"weights_per_step": 2}, "weights_per_step=2", "needs one MLP per layer, so 0"),
    ({"ttt_kind": "ttt-mlp"}, "ttt_kind='ttt-mlp'", "must be 'in_place' or 'mlp'"),
    ({"ttt_kind": None}, "ttt_kind=None", "must be 'in_place' or 'mlp'"),
    ({"ttt_kind": "mlp"}, "ttt_chunk_size=5", 'not with ttt_kind="mlp", which takes ttt_enabled, ttt_kind'),
    ({"ttt_base_lr": 1.0}, "ttt_base_lr=1.0", 'not with ttt_kind="in_place", which takes ttt_enabled, ttt_kind, '),
    ({"ttt_mini_batch_size": 8, "ttt_kind": "in_place"}, "ttt_mini_batch_size=8", 'not with ttt_kind="in_place"'),
    ({"depformer_ttt_enabled": True}, "depformer_ttt_enabled=True", "never gets TTT"),
]


BAD_MLP = [
    ({"ttt_chunk_size": 256}, "ttt_chunk_size=256", 'not with ttt_kind="mlp"'),  # also what is the default there
    ({"ttt_update": "hebbian"}, "ttt_update='hebbian'", "which takes ttt_enabled, ttt_kind, ttt_layers, ttt_base_lr"),
    ({"ttt_learning_rate": 0.1}, "ttt_learning_rate=0.1", 'not with ttt_kind="mlp"'),
    ({"ttt_delta_clip": None}, "ttt_delta_clip=None", 'not with ttt_kind="mlp"'),
    ({"ttt_start_layer": 1}, "ttt_start_layer=1", 'not with ttt_kind="mlp"'),
    ({"ttt_mini_batch_size": 0}, "ttt_mini_batch_size=0", "a whole number from 1 to 1000000"),
    ({"ttt_mini_batch_size": 8.0}, "ttt_mini_batch_size=8.0", "a whole number from 1 to 1000000"),
    ({"ttt_base_lr": 0}, "ttt_base_lr=0", "a positive number, at most 1e+06"),
    ({"ttt_base_lr": math.nan}, "ttt_base_lr=nan", "a positive number, at most 1e+06"),
    ({"ttt_base_lr": math.inf}, "ttt_base_lr=inf", "a positive number, at most 1e+06"),
    ({"ttt_initial_gating_alpha": math.nan}, "ttt_initial_gating_alpha=nan", "a number from -1000 to 1000"),
    ({"ttt_initial_gating_alpha": "0.1"}, "ttt_initial_gating_alpha='0.1'", "a number from -1000 to 1000"),
    ({"ttt_scan_checkpoint_group_size": -1}, "ttt_scan_checkpoint_group_size=-1", "a whole number from 0 to 1000000"),
    ({"ttt_layers": [4]}, "ttt_layers=[4]", "indices from 0 to 3"),
    ({"ttt_persistent_states": True}, "ttt_persistent_states=True", "unknown argument; allowed are "),
    ({"num_heads": 3}, "num_heads=3", 'must be a whole number that divides dim=16, with ttt_kind="mlp"'),
    ({"num_heads": 0}, "num_heads=0", "must be a whole number that divides dim=16"),
    ({"dim": 18, "num_heads": 4}, "num_heads=4", "must be a whole number that divides dim=18"),
    ({"weights_per_step": 2}, "weights_per_step=2", "needs one MLP per layer, so 0"),
    ({"num_layers": 0}, "num_layers=0", "positive whole number"),
]


@pytest.fixture
def unbuilt(monkeypatch):
    """Fails when the stock constructor runs: the error must come before."""

    def refuse(*_, **__):
        pytest.fail("the stock constructor ran before the error")

    monkeypatch.setattr(LMModel, "__init__", refuse)
    moshi_patch.install()
    yield
    moshi_patch.uninstall()


@pytest.mark.parametrize(("override", "named", "allowed"), BAD, ids=[named for _, named, _ in BAD])
@pytest.mark.usefixtures("unbuilt")
def test_bad_settings_are_refused_before_anything_is_built(override, named, allowed):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the message is checked below
        LMModel(**{**TINY, **TTT, **override})
    assert named in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(("override", "named", "allowed"), BAD_MLP, ids=[named for _, named, _ in BAD_MLP])
@pytest.mark.usefixtures("unbuilt")
def test_bad_settings_of_the_kind_mlp_are_refused_before_anything_is_built(override, named, allowed):
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the message is checked below
        LMModel(**{**TINY, **TTT_MLP, **override})
    assert named in str(error.value)
    assert allowed in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [5, 11, 17, 23, 29]),
        ({"layers": "1,5, 10"}, [1, 5, 10]),
        ({"layers": [7, 3, 3]}, [3, 7]),
        ({"layers": "all"}, list(range(32))),
        ({"layers": "middle"}, list(range(8, 24))),
        ({"start_layer": 0, "layer_frequency": 10}, [0, 10, 20, 30]),
    ],
    ids=str,
)
def test_layer_selection_in_a_model_of_32_layers(settings, expected):
    assert TTTConfig(enabled=True, **settings).layer_indices(32) == expected


def test_settings_survive_the_round_trip_through_keyword_arguments():
    config = TTTConfig(enabled=True, layers="middle", chunk_size=64, delta_clip=0.1)
    assert TTTConfig.from_kwargs(config.to_kwargs()) == config
    assert "ttt_kind" not in config.to_kwargs()  # a model of before there were two kinds reads it
    mlp = TTTConfig(enabled=True, kind="mlp", mini_batch_size=8, base_lr=0.05)
    assert TTTConfig.from_kwargs(mlp.to_kwargs()) == mlp
    assert mlp.to_kwargs() == {
        "ttt_enabled": True,
        "ttt_kind": "mlp",
        "ttt_layers": "middle",
        "ttt_base_lr": 0.05,
        "ttt_mini_batch_size": 8,
        "ttt_initial_gating_alpha": 0.0,
        "ttt_scan_checkpoint_group_size": 8,
    }


@pytest.mark.usefixtures("patched")
def test_settings_without_the_switch_are_not_ignored_silently():
    with pytest.warns(UserWarning, match="ttt_layers given without ttt_enabled=True"):
        assert not moshi_patch.ttt_gatings(tiny_model(ttt_layers="all"))


@pytest.mark.usefixtures("patched")
def test_a_chunk_longer_than_the_attention_window_is_warned_about(caplog):
    tiny_model(**{**TTT, "ttt_chunk_size": 9})
    assert caplog.text == ""
    tiny_model(**{**TTT, "ttt_chunk_size": 10})
    assert "ttt_chunk_size=10 is longer than context=9" in caplog.text


def test_a_moshi_of_another_shape_is_refused_by_name_and_left_alone(monkeypatch):
    from moshi.modules.transformer import StreamingTransformerLayer

    stock = LMModel.__init__
    monkeypatch.setattr(StreamingTransformerLayer, "_ff_block", lambda self, x, extra: x)
    with pytest.raises(RuntimeError, match=r"\(self, x, extra\) should take x alone"):
        moshi_patch.install()
    assert not moshi_patch.is_installed()
    assert LMModel.__init__ is stock


@pytest.mark.parametrize("function", [moshi_patch.ttt_stats, lambda m: moshi_patch.ttt_updates(m).__enter__()])
def test_a_control_on_a_model_without_ttt_is_an_error_not_a_silent_nothing(function):
    with pytest.raises(ValueError, match="no TTT layer"):
        function(torch.nn.Linear(1, 1))


@pytest.mark.usefixtures("patched")
def test_stats_before_streaming_report_weights_only():
    for stats in moshi_patch.ttt_stats(tiny_model(**TTT)).values():
        assert stats["updates"] is stats["delta_norm"] is stats["relative_delta"] is None
        assert stats["conv_norm"] == 0.0
        assert stats["W_target_norm"] == pytest.approx(4.0)


def test_settings_are_read_without_torch_and_every_public_name_is_there():
    code = "import sys, moshi_patch; moshi_patch.TTTConfig(); print(sys.modules.keys() & {'torch', 'moshi', 'numpy'})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    assert all(hasattr(moshi_patch, name) for name in moshi_patch.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = moshi_patch.nothing
