"""What trains of a model with memories of the kind `mlp`, at which rate, and what weight decay leaves alone."""

import pytest

import moshi_patch
from finetune.model.adapters import add_adapters
from finetune.model.trainable import FIRST_GROUPS, parameter_groups
from finetune.settings.record import from_dict
from finetune.settings.schema import TrainArgs
from finetune.training.optimizer import build_optimizer
from tests.support.models import tiny_model

pytestmark = pytest.mark.usefixtures("patched")

MLP = {"enabled": True, "kind": "mlp", "layers": [1, 3]}
NEW = {"ttt_layers": 7 * 2, "ttt_gates_and_biases": 12 * 2}
"""Tensors by group, of two layers."""


def args_for(**settings) -> TrainArgs:
    return from_dict({"optim": {"lr": 1e-3, "weight_decay": 0.2}, "ttt": MLP, **settings})


def groups_for(args: TrainArgs):
    model = tiny_model(**args.ttt.to_kwargs())
    if args.lora.enable:
        add_adapters(model, 3, 2.0)
    return model, parameter_groups(model, args)


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({}, []),
        ({"training_mode": "ttt"}, []),
        ({"lora": {"enable": True}}, ["adapters"]),
        ({"training_mode": "lora+ttt"}, ["adapters"]),
        ({"lora": {"enable": True, "ft_embed": True}}, ["adapters", "embeddings"]),
        ({"full_finetuning": True}, ["embeddings", "base"]),
    ],
    ids=str,
)
def test_all_19_tensors_of_a_layer_train_in_two_groups_beside_what_the_mode_trains(settings, others):
    _, groups = groups_for(args_for(**settings))
    sizes = {group.name: len(group.parameters) for group in groups}
    assert {name: size for name, size in sizes.items() if name in FIRST_GROUPS} == NEW
    assert sizes.keys() - NEW.keys() == set(others)


@pytest.mark.parametrize("mode", ["lora", "frozen"])
def test_in_a_mode_without_ttt_none_of_them_trains(mode):
    _, groups = groups_for(args_for(training_mode=mode))
    assert {group.name for group in groups} <= {"adapters"}


def test_w_down_has_its_adapter_and_does_not_train_itself():
    model, groups = groups_for(args_for(lora={"enable": True}))
    adapters = next(group for group in groups if group.name == "adapters").parameters
    for layer in (1, 3):
        assert f"transformer.layers.{layer}.gating.linear_out.lora_A.weight" in adapters
    assert not any("frozen_W" in name for group in groups for name in group.parameters)
    assert not any("lora" in name for name in moshi_patch.ttt_parameters(model)), "nor has a memory adapters"


@pytest.mark.parametrize(("given", "expected"), [({}, 5e-3), ({"optim_lr": 0.02}, 0.02)])
def test_they_train_at_their_own_rate_and_gates_gains_and_biases_do_not_decay(given, expected):
    args = args_for(ttt={**MLP, **given}, lora={"enable": True})
    _, groups = groups_for(args)
    optimizer, _ = build_optimizer(groups, args.optim, 100)
    rates = {group["name"]: (group["max_lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert rates == {
        "ttt_layers": (expected, 0.2),
        "ttt_gates_and_biases": (expected, 0.0),
        "adapters": (1e-3, 0.2),
    }
    quiet = next(group for group in groups if group.name == "ttt_gates_and_biases").parameters
    assert {name.rpartition("ttt.")[2] for name in quiet} == {
        *("b1", "b2", "ttt_norm_weight", "ttt_norm_bias", "learnable_ttt_lr_bias", "gating_alpha"),
        *(f"{name}.bias" for name in ("wq", "wk", "wv", "wo", "post_norm")),
        "post_norm.weight",
    }
