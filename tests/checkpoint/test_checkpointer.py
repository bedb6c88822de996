"""A checkpoint is served by stock moshi as it was trained, and appears whole or not at all."""

import copy
import json
import os

import pytest
import torch
from moshi.modules.lora import LoRALinear
from safetensors.torch import load_file

import moshi_patch
from finetune.settings.record import from_dict
from tests.support.checkpoint_runs import LORA, MODES, TTT, advance, arguments, same, served, snapshot, tiny_run
from tests.support.loading import KEYS, W_DOWN, assert_active, assert_loaded, logits, save
from tests.support.models import relative, tiny_model

pytestmark = pytest.mark.usefixtures("patched")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_stock_moshi_serves_the_checkpoint_as_it_was_trained(tmp_path, mode, dtype):
    args = arguments(tmp_path / "run", param_dtype=dtype, **MODES[mode])
    kind = getattr(torch, dtype)
    base = save(tiny_model(kind).state_dict(), tmp_path / "base.safetensors")  # stock: no TTT in it
    checkpointer, state = tiny_run(args)
    before = logits(state.model)
    advance(state, 3)
    path = checkpointer.save(state)
    loaded = served(path, base, kind)
    assert_loaded(loaded, kind)
    state.model.requires_grad_(False)  # float32 products are rounded otherwise beside a weight that trains
    loaded.requires_grad_(False)
    assert relative(logits(state.model), before) > 1e-2  # something was trained
    if mode == "merged":
        # computed in float32: what differs is that merged weights are rounded once more
        difference = relative(logits(copy.deepcopy(loaded).float()), logits(copy.deepcopy(state.model).float()))
        assert difference < (1e-5 if dtype == "float32" else 2e-2)
    else:
        assert torch.equal(logits(loaded), logits(state.model))
    assert_active(loaded)
    assert loaded.ttt_config == state.model.ttt_config
    assert same(served(path, base, kind, named=True).state_dict(), loaded.state_dict())
    adapted = [module for module in loaded.modules() if isinstance(module, LoRALinear)]
    assert bool(adapted) == (mode == "adapter")


@pytest.mark.parametrize("train_w_down", [True, False])
@pytest.mark.parametrize("ft_embed", [False, True])
def test_an_adapter_file_holds_what_serving_needs_and_no_more(tmp_path, ft_embed, train_w_down):
    settings = {"lora": LORA | {"ft_embed": ft_embed}, "ttt": TTT | {"train_w_down": train_w_down}}
    checkpointer, state = tiny_run(arguments(tmp_path, **settings))
    file = checkpointer.save(state) / "consolidated" / "lora.safetensors"
    linear = {name for name, module in tiny_model().named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {f"{name}.lora_{which}.weight" for name in linear for which in "AB"} | {*KEYS, *W_DOWN}
    embeddings = {name for name in tiny_model().state_dict() if "emb" in name}
    assert load_file(file).keys() == expected | (embeddings if ft_embed else set())


@pytest.mark.parametrize("mode", MODES)
def test_settings_lie_beside_the_weights(tmp_path, mode):
    args = arguments(tmp_path, wandb={"key": "secret"}, **MODES[mode])
    args.wandb.project = None
    checkpointer, state = tiny_run(args)
    checkpointer.lm_config["lora_name"] = "of-the-base.safetensors"
    folder = checkpointer.save(state) / "consolidated"
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in config if key.startswith("ttt_")} == args.ttt.to_kwargs()
    assert config["lora"] == (mode == "adapter")
    assert ("lora_rank" in config) == (mode == "adapter")
    # not the base's, which moshi would load
    assert config.get("lora_name") == (f"file://{folder / 'lora.safetensors'}" if mode == "adapter" else None)
    training = json.loads((folder / "training_config.json").read_text())
    args.wandb.key = None
    assert from_dict(training["training"]) == args
    assert training["versions"].keys() == {"python", "torch", "moshi", "moshi_ttt"}
    assert "secret" not in json.dumps(training)


def test_only_the_newest_are_kept_and_nothing_else_is_touched(tmp_path):
    checkpointer, state = tiny_run(arguments(tmp_path, num_ckpt_keep=2))
    folder = tmp_path / "checkpoints"
    others = ["checkpoint_best", ".tmp-mine", "checkpoint_12", "notes"]
    for name in others:
        (folder / name).mkdir(parents=True)
    for _ in range(4):
        advance(state)
        checkpointer.save(state)
    assert sorted(os.listdir(folder)) == sorted([*others, "checkpoint_000003", "checkpoint_000004"])
    assert checkpointer.find() == folder / "checkpoint_000004"
    assert checkpointer.find(3) == folder / "checkpoint_000003"
    with pytest.raises(ValueError, match=r"resume_step=1: .*there are 3, 4"):
        checkpointer.find(1)


def test_null_keeps_all_and_do_ckpt_false_saves_none(tmp_path):
    checkpointer, state = tiny_run(arguments(tmp_path / "all", num_ckpt_keep=None))
    for _ in range(5):
        advance(state)
        checkpointer.save(state)
    assert len(os.listdir(tmp_path / "all" / "checkpoints")) == 5
    checkpointer, state = tiny_run(arguments(tmp_path / "none", do_ckpt=False))
    assert checkpointer.save(state) is None
    assert checkpointer.find() is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="there is none"):
        checkpointer.find(3)


def test_a_run_that_goes_back_keeps_its_old_course_aside(tmp_path, caplog):
    args = arguments(tmp_path, num_ckpt_keep=1)
    args.num_ckpt_keep = None
    checkpointer, state = tiny_run(args)
    for _ in range(3):
        advance(state)
        checkpointer.save(state)
    checkpointer, state = tiny_run(args)
    checkpointer.load(checkpointer.find(1), state)
    advance(state)
    new = checkpointer.save(state)
    assert checkpointer.save(state) == new  # the same step again: nothing is written
    names = ["abandoned-checkpoint_000002", "abandoned-checkpoint_000003", "checkpoint_000001", "checkpoint_000002"]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == names
    assert checkpointer.find() == new
    assert "abandoned-checkpoint_000003" in caplog.text


def test_saving_changes_nothing_in_the_run(tmp_path):
    checkpointer, state = tiny_run(arguments(tmp_path, **MODES["merged"]))
    advance(state)
    before = snapshot(state)
    generator = torch.get_rng_state()
    checkpointer.save(state)
    assert same(snapshot(state), before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert sorted(moshi_patch.ttt_parameters(state.model)) == KEYS
