"""A model that has TTT layers: find them, load them from a stock or a trained checkpoint, mute and measure them."""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .config import TTTConfig
from .kinds.in_place import TTTGating
from .kinds.in_place.ops import ResidualFastWeight, delta_norm

TARGET_KEYS = ("conv1d.conv.weight", "W_target.weight")
TARGET_KEY = re.compile(r"transformer\.layers\.(\d+)\.gating\.target_generator\.(.+)")
WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""What FSDP, activation checkpointing and torch.compile add to names of modules, but not to those of a checkpoint."""


def stock_name(name: str) -> str:
    """The name of a module or parameter without what wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def target_key(name: str) -> tuple[int, str] | None:
    """The layer of a target generator and which of `TARGET_KEYS` it is, for its name in a checkpoint; else None."""
    match = TARGET_KEY.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def ttt_gatings(model: nn.Module) -> dict[str, TTTGating]:
    """The TTT gatings of `model`, by their names in it and in layer order; empty for a model without TTT."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TTTGating)}


def ttt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the target generators, by their names in `model`: found by structure, not by name."""
    return {
        f"{name}.target_generator.{key}": parameter
        for name, gating in ttt_gatings(model).items()
        for key, parameter in gating.target_generator.named_parameters()
    }


def prepare_targets(model: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """A load hook for `LMModel`: a checkpoint has the weights of every target generator or of none.

    With none, generators that hold values keep them (LoRA adapters are loaded in a second pass), and generators on the
    meta device get their initial values, on the device of the checkpoint's tensors.

    Raises:
        ValueError: when the checkpoint has some of the keys and not all of them.
    """
    gatings = {stock_name(name): gating for name, gating in ttt_gatings(model).items()}
    wanted = [f"{prefix}{name}.target_generator.{key}" for name in gatings for key in TARGET_KEYS]
    missing = [name for name in wanted if name not in state_dict]
    if not missing:
        return
    if len(missing) < len(wanted):
        present = [name for name in wanted if name in state_dict]
        raise ValueError(
            f"The checkpoint has {len(present)} of the {len(wanted)} TTT weights of this model; it must have all of "
            f"them or none. Missing: {', '.join(missing)}. Present: {', '.join(present)}. "
            "Were its ttt_layers (ttt_start_layer, ttt_layer_frequency) the same?"
        )
    device = next((value.device for value in state_dict.values() if isinstance(value, torch.Tensor)), None)
    for gating in gatings.values():
        gating.target_generator.materialise(device)


@contextlib.contextmanager
def ttt_updates(model: nn.Module, enabled: bool = False, layers: Sequence[int | str] | None = None) -> Iterator[None]:
    """Inside, the fast weights of `model` learn nothing: the control for every comparison.

    What was learnt before stays in force. While streaming, positions and chunk boundaries go on, what is heard inside
    is never written, and a chunk heard wholly inside makes no update. In one pass no step learns from any other.
    Works for rows of a batch together, and holds inside replayed CUDA graphs. Such blocks may nest, not overlap.

    Args:
        model: has TTT layers.
        enabled: True switches updates on, inside a block where they are off.
        layers: of these TTT layers alone, by index in the transformer or by the name of the gating or of its layer.
            None: of all.

    Raises:
        ValueError: when `model` has no TTT layer, as the comparison would show nothing, or `layers` names something
            else than its TTT layers.
    """
    gatings = _selected(require_gatings(model), layers)
    before = [gating.updates_enabled for gating in gatings]
    for gating in gatings:
        gating.set_updates(enabled)
    try:
        yield
    finally:
        for gating, was_enabled in zip(gatings, before, strict=True):
            gating.set_updates(was_enabled)


def _selected(gatings: dict[str, TTTGating], layers: Sequence[int | str] | None) -> list[TTTGating]:
    if layers is None:
        return list(gatings.values())
    by_name: dict[int | str, TTTGating] = {}
    for name, gating in gatings.items():
        layer = stock_name(name).removesuffix(".gating")
        by_name |= {name: gating, stock_name(name): gating, layer: gating}
        if layer.rpartition(".")[2].isdecimal():
            by_name[int(layer.rpartition(".")[2])] = gating
    indices = [key for key in by_name if isinstance(key, int)]
    chosen = list(layers) if isinstance(layers, (list, tuple, set, frozenset, range)) else []
    if not chosen or not all(type(key) in (int, str) and key in by_name for key in chosen):
        raise ValueError(
            f"layers={layers!r}: must be a list of TTT layers of this model: {indices}, or names such as "
            f"{next(iter(gatings))!r}."
        )
    return list(dict.fromkeys(by_name[key] for key in chosen))


def finite_rows(model: nn.Module) -> torch.Tensor:
    """`[B]` bool: whether all that the transformer of the streaming `model` answered since a row's reset was finite.

    A row that is not stays so until it is reset, as its caches are spoilt. Nothing is computed and nothing waits for
    the device; the tensor is a copy. With classifier-free guidance B counts the rows with and without conditions.

    Raises:
        ValueError: when `model` has no TTT layer or is not streaming.
    """
    last = list(require_gatings(model).values())[-1]
    if last._streaming_state is None:
        raise ValueError(f"{type(model).__name__} is not streaming: there are no rows outside of a stream.")
    return last._streaming_state.finite.clone()


def one_pass_delta_norm(z: torch.Tensor, v: torch.Tensor, config: TTTConfig) -> torch.Tensor:
    """`[B]`, at least float32: Frobenius norm of what one pass has taught the fast weight when its last chunk begins.

    Args:
        z: `[B, T, H]`, what enters the down projection.
        v: `[B, T', D]`, the target generator's output: T' is a multiple of C.
        config: of the layer.
    """
    names = ("chunk_size", "learning_rate", "update", "target_gain", "delta_clip", "decay")
    return delta_norm(z, v, **{name: getattr(config, name) for name in names})


@torch.no_grad()
def ttt_stats(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the fast weights did, read from the streaming state itself. Waits for the device: not for every step.

    Returns:
        For the name of each TTT gating, in layer order:
        `updates`: list of ints, updates per row since its last reset;
        `delta_norm`: list of floats, Frobenius norm of the fast weight's change per row;
        `relative_delta`: the same over the norm of W_down;
        `known`: list of floats from 0 to 1, how much of its last full chunk's targets a row knew already, or None for
            a row without; None altogether unless `ttt_update="residual"`;
        `conv_norm`, `W_target_norm`: floats, norms of the target generator's weights; with the first 0 nothing is
        learnt.
        The first four are None while the model is not streaming.

    Raises:
        ValueError: when `model` has no TTT layer.
    """
    return {name: _layer_stats(gating) for name, gating in require_gatings(model).items()}


def _layer_stats(gating: TTTGating) -> dict[str, Any]:
    generator = gating.target_generator
    stats: dict[str, Any] = {"updates": None, "delta_norm": None, "relative_delta": None, "known": None}
    state = gating._streaming_state
    if state is not None:
        norms = gating.delta().flatten(1).norm(dim=1)
        stats["updates"] = state.fast.updates.tolist()
        stats["delta_norm"] = norms.tolist()
        stats["relative_delta"] = (norms / gating.w_down().norm().to(norms)).tolist()
        if isinstance(state.fast, ResidualFastWeight):
            stats["known"] = [share if math.isfinite(share) else None for share in state.fast.known_share().tolist()]
    stats["conv_norm"] = generator.conv1d.conv.weight.float().norm().item()
    stats["W_target_norm"] = generator.W_target.weight.float().norm().item()
    return stats


def require_gatings(model: nn.Module) -> dict[str, TTTGating]:
    """`ttt_gatings`, of which there is at least one.

    Raises:
        ValueError: when `model` has no TTT layer.
    """
    gatings = ttt_gatings(model)
    if not gatings:
        raise ValueError(
            f"{type(model).__name__} has no TTT layer: build it with ttt_enabled=True after moshi_patch.install()."
        )
    return gatings
