"""Seeing and steering TTT in a running model: the control switch and the numbers that tell activity from a dead run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .gating import TTTGating
from .state_dict import ttt_gatings


@contextlib.contextmanager
def ttt_updates(model: nn.Module, enabled: bool = False) -> Iterator[None]:
    """Inside, the fast weights of `model` learn nothing: the control for every comparison.

    What was learnt before stays in force. While streaming, positions and chunk boundaries go on, what is heard inside
    is never written, and a chunk heard wholly inside makes no update. In one pass no step learns from any other.
    Works for rows of a batch together, and holds inside replayed CUDA graphs. Such blocks may nest, not overlap.

    Raises:
        ValueError: when `model` has no TTT layer, as the comparison would show nothing.
    """
    gatings = list(require_gatings(model).values())
    before = [gating.updates_enabled for gating in gatings]
    for gating in gatings:
        gating.set_updates(enabled)
    try:
        yield
    finally:
        for gating, was_enabled in zip(gatings, before, strict=True):
            gating.set_updates(was_enabled)


@torch.no_grad()
def ttt_stats(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the fast weights did, read from the streaming state itself. Waits for the device: not for every step.

    Returns:
        For the name of each TTT gating, in layer order:
        `updates`: list of ints, updates per row since its last reset;
        `delta_norm`: list of floats, Frobenius norm of the fast weight's change per row;
        `relative_delta`: the same over the norm of W_down;
        `conv_norm`, `W_target_norm`: floats, norms of the target generator's weights; with the first 0 nothing is
        learnt.
        The first three are None while the model is not streaming.

    Raises:
        ValueError: when `model` has no TTT layer.
    """
    return {name: _layer_stats(gating) for name, gating in require_gatings(model).items()}


def _layer_stats(gating: TTTGating) -> dict[str, Any]:
    generator = gating.target_generator
    stats: dict[str, Any] = {"updates": None, "delta_norm": None, "relative_delta": None}
    state = gating._streaming_state
    if state is not None:
        norms = state.fast.full_delta(gating.config.learning_rate).flatten(1).norm(dim=1)
        stats["updates"] = state.fast.updates.tolist()
        stats["delta_norm"] = norms.tolist()
        stats["relative_delta"] = (norms / gating.w_down().norm().to(norms)).tolist()
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
