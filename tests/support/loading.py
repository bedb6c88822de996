"""Shared by the loading tests: files of tiny models, what a model answers, random adapters."""

import copy

import torch
from moshi.models import LMModel, loaders
from moshi.modules.lora import replace_all_linear_with_lora
from safetensors.torch import save_file

import moshi_patch
from tests.support.models import TINY, random_codes, randomise_targets, relative, tiny_model, ttt_settings

STEPS = 24
"""Four full chunks of 5 and a ragged one, and more than the context of 9."""

LORA = {"lora": True, "lora_rank": 3, "lora_scaling": 2.0}
KEYS = sorted(
    f"transformer.layers.{i}.gating.target_generator.{key}"
    for i in (1, 3)
    for key in ("conv1d.conv.weight", "W_target.weight")
)
"""The keys of all target generators of a model with `TTT`."""

W_DOWN = [f"transformer.layers.{i}.gating.linear_out.weight" for i in (1, 3)]


def save(state: dict, path):
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, path)
    return path


def trained_model(dtype: torch.dtype, **overrides) -> LMModel:
    return randomise_targets(tiny_model(dtype, **ttt_settings(**overrides)))


def load(path, dtype=torch.float32, base=TINY, lora_weights=None, fuse_lora=False, **overrides) -> LMModel:
    """`get_moshi_lm` as a user calls it: everything about TTT comes in through `lm_kwargs_overrides`."""
    return loaders.get_moshi_lm(
        path, base, dtype=dtype, lora_weights=lora_weights, fuse_lora=fuse_lora, lm_kwargs_overrides=overrides
    )


@torch.no_grad()
def logits(model: LMModel, steps: int = STEPS) -> torch.Tensor:
    """Text and audio logits of one pass over fixed codes, as one vector."""
    out = model(random_codes(model, 2, steps))
    return torch.cat([out.text_logits.flatten(), out.logits[out.mask].flatten()]).nan_to_num()


@torch.no_grad()
def streamed(model: LMModel, steps: int = STEPS) -> torch.Tensor:
    """Text logits `[B, 1, T, card]` of the same codes, one step at a time."""
    with model.streaming(2):
        return torch.cat([model.forward_text(c)[1] for c in random_codes(model, 2, steps).split(1, 2)], 2)


def assert_active(model: LMModel) -> None:
    """The fast weights change what the model answers: the comparison beside it is not one of two stock models."""
    with moshi_patch.ttt_updates(model):
        off = logits(model)
    assert relative(logits(model), off) > 1e-3


def assert_loaded(model: LMModel, dtype: torch.dtype) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert [name for name, tensor in tensors.items() if tensor.is_meta] == []
    assert {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype != dtype} == {}


def with_lora(model: LMModel) -> LMModel:
    """A copy of `model` with random adapters on every linear layer."""
    model = copy.deepcopy(model)
    replace_all_linear_with_lora(model, LORA["lora_rank"], LORA["lora_scaling"])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def adapters(model: LMModel, ttt: bool = False, w_down: bool = False) -> dict[str, torch.Tensor]:
    """What a training run with LoRA saves of `model`; full weights under their stock keys."""
    state = model.state_dict()
    chosen = {key: value for key, value in state.items() if "lora_" in key}
    if ttt:
        chosen |= {key: state[key] for key in moshi_patch.ttt_parameters(model)}
    if w_down:
        chosen |= {key: state[key.replace("weight", "frozen_W.weight")] for key in W_DOWN}
    return chosen
