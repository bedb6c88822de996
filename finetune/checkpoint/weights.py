"""The weights that are served: adapters or the whole model in one safetensors file, with the keys of stock moshi."""

from pathlib import Path

import torch
from moshi.modules.lora import LoRALinear
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import moshi_patch
from moshi_patch import stock_name

from ..common.distributed import Context
from ..model.adapters import lora_layers, lora_parameters
from ..model.tensor_file import read_header
from .base_fingerprint import in_precision
from .training_state import quiet


@torch.no_grad()
def collect_weights(
    model: nn.Module, ctx: Context, *, adapters: bool, dtype: torch.dtype, trained_alone: bool = False
) -> dict[str, torch.Tensor] | None:
    """The tensors to save, on rank 0 (on the CPU, when the model is on CUDA); None on the other ranks. Collective.

    Needs the memory of the whole model on rank 0, whatever is taken of it.

    Args:
        adapters: only what training with adapters changes: the adapters of all linear layers, target generators, the
            full W_down of TTT layers, and all else that is trainable. Otherwise everything, adapters merged.
        trained_alone: of a model without adapters, the target generators and what is trainable.
        dtype: of what is saved; conditioners stay as they are, in float32, as moshi loads them.
    """
    # FSDP frees what it "offloads" from one CPU tensor to the same
    options = StateDictOptions(full_state_dict=True, cpu_offload=ctx.device.type == "cuda")
    with quiet():
        state = get_model_state_dict(model, options=options)
    if ctx.rank:
        return None
    layers = lora_layers(model)
    if adapters or trained_alone:
        chosen = _adapter_names(model, layers) if adapters else _trained_names(model)
        state = {name: value for name, value in state.items() if name in chosen}
    else:
        _merge(state, layers)
    to_file = {inside: name for name, inside in renamed(layers).items()}
    return {to_file.get(name, name): in_precision(name, value, dtype).contiguous() for name, value in state.items()}


def saved_tensors(model: nn.Module, *, adapters: bool, trained_alone: bool = False) -> dict[str, torch.Tensor]:
    """What :func:`collect_weights` would save of `model`, by the keys of the file; nothing is copied, cast or merged.

    Args:
        model: not wrapped; may be on the meta device.
        adapters: what training with adapters changes. Otherwise all that is no adapter.
        trained_alone: as there.
    """
    layers, state = lora_layers(model), model.state_dict()
    chosen = _adapter_names(model, layers) if adapters else state.keys() - lora_parameters(model).keys()
    chosen = _trained_names(model) if trained_alone else chosen
    to_file = {inside: name for name, inside in renamed(layers).items()}
    return {to_file.get(name, name): value for name, value in state.items() if name in chosen}


def ttt_tensors(weights: Path, model: nn.Module) -> str:
    """How much of a file of weights TTT added to a stock model: `10 tensors of TTT, 335,626,240 bytes`.

    Args:
        model: that the file belongs to, wrapped or not.
    """
    names = {stock_name(name) for name in moshi_patch.ttt_parameters(model)}
    held = [stored for name, stored in read_header(weights).items() if name in names]
    return f"{len(held)} tensors of TTT, {sum(stored.bytes for stored in held):,} bytes"


def renamed(layers: dict[str, LoRALinear]) -> dict[str, str]:
    """Keys of weights below adapters: in stock moshi -> in a model with adapters."""
    return {f"{name}.{key}": f"{name}.frozen_W.{key}" for name in layers for key in ("weight", "bias")}


def _adapter_names(model: nn.Module, layers: dict[str, LoRALinear]) -> set[str]:
    """Names, in the model, of the tensors that an adapter file holds."""
    inside = renamed(layers)
    names = lora_parameters(model).keys()
    w_down = [f"{stock_name(name)}.linear_out.weight" for name in moshi_patch.ttt_gatings(model)]
    return names | {inside.get(name, name) for name in w_down} | _trained_names(model)


def _trained_names(model: nn.Module) -> set[str]:
    """Names, in the model, of the target generators, which no base model has, and of all that is trainable."""
    trainable = {stock_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trainable | {stock_name(name) for name in moshi_patch.ttt_parameters(model)}


def _merge(state: dict[str, torch.Tensor], layers: dict[str, LoRALinear]) -> None:
    """Adds every adapter to its layer's weight in float32 or more, rounded once; `state` loses the adapters."""
    for name, layer in layers.items():
        down, up = state.pop(f"{name}.lora_A.weight"), state.pop(f"{name}.lora_B.weight")
        weight = state[f"{name}.frozen_W.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.to(wide) + layer.scaling * (up.to(wide) @ down.to(wide))
        state[f"{name}.frozen_W.weight"] = merged.to(weight.dtype)
