"""A model that has TTT layers: find their memories, mute and bypass and measure them, whatever their kind."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .kinds.in_place import TTTGating
from .kinds.memory import TTTMemory

WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod"})
"""What FSDP, activation checkpointing and torch.compile add to names of modules, but not to those of a checkpoint."""


def stock_name(name: str) -> str:
    """The name of a module or parameter without what wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def ttt_memories(model: nn.Module) -> dict[str, TTTMemory]:
    """The memories of `model`, of any kind, by their names in it and in layer order; empty for a model without TTT."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TTTMemory)}


def ttt_gatings(model: nn.Module) -> dict[str, TTTGating]:
    """The memories of `model` that are gated MLPs (`ttt_kind="in_place"`), by their names in it and in layer order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TTTGating)}


def ttt_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that TTT adds to a stock model, by their names in `model`: found by structure, not by name."""
    return {
        f"{name}.{key}": parameter
        for name, memory in ttt_memories(model).items()
        for key, parameter in memory.new_parameters().items()
    }


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
    memories = _selected(require_memories(model), layers)
    with contextlib.ExitStack() as restore:
        for memory in memories:
            restore.callback(memory.set_updates, memory.updates_enabled)
            memory.set_updates(enabled)
        yield


def _selected(memories: dict[str, TTTMemory], layers: Sequence[int | str] | None) -> list[TTTMemory]:
    if layers is None:
        return list(memories.values())
    by_name: dict[int | str, TTTMemory] = {}
    for name, memory in memories.items():
        layer = stock_name(name).rpartition(".")[0]
        by_name |= {name: memory, stock_name(name): memory, layer: memory}
        if layer.rpartition(".")[2].isdecimal():
            by_name[int(layer.rpartition(".")[2])] = memory
    indices = [key for key in by_name if isinstance(key, int)]
    chosen = list(layers) if isinstance(layers, (list, tuple, set, frozenset, range)) else []
    if not chosen or not all(type(key) in (int, str) and key in by_name for key in chosen):
        raise ValueError(
            f"layers={layers!r}: must be a list of TTT layers of this model: {indices}, or names such as "
            f"{next(iter(memories))!r}."
        )
    return list(dict.fromkeys(by_name[key] for key in chosen))


@contextlib.contextmanager
def ttt_bypassed(model: nn.Module) -> Iterator[None]:
    """Inside, nothing that the memories of `model` hold is read: the base, with what training made of its weights.

    With `ttt_kind="in_place"` nothing is added to the stock MLP, with "mlp" every gate is 0. What is heard is written
    as outside, unless :func:`ttt_updates` says otherwise: these are two switches. With "mlp" updates off alone is not
    the base, as the inner MLP that a stream begins with is still read. Holds inside replayed CUDA graphs.

    Raises:
        ValueError: when `model` has no TTT layer.
    """
    with contextlib.ExitStack() as restore:
        for memory in require_memories(model).values():
            restore.callback(memory.set_bypassed, memory.bypassed)
            memory.set_bypassed(True)
        yield


def ttt_row_updates(model: nn.Module, rows: Sequence[int], enabled: bool) -> None:
    """Switch the updates of some rows of the streaming `model` off or on. A reset of a row switches its updates on.

    For such a row it is as under :func:`ttt_updates`; the other rows are the same bit for bit. Holds inside replayed
    CUDA graphs, and nothing waits for the device. Where :func:`ttt_updates` switches off, no row learns.

    Args:
        rows: from 0. With classifier-free guidance those with and without conditions are rows of their own.

    Raises:
        ValueError: when `model` has no TTT layer, is not streaming or has no such row; nothing is changed then.
    """
    states = [memory._streaming_state for memory in require_memories(model).values()]
    if None in states:
        raise ValueError(f"{type(model).__name__} is not streaming: there are no rows outside of a stream.")
    if type(enabled) is not bool:
        raise ValueError(f"enabled={enabled!r}: must be True or False.")
    count = states[0].batch_size
    if not isinstance(rows, (list, tuple, set, frozenset, range)) or not all(
        type(row) is int and 0 <= row < count for row in rows
    ):
        raise ValueError(f"rows={rows!r}: must be a list of rows of the stream, from 0 to {count - 1}.")
    for state in states:
        state.set_learning(rows, enabled)


def finite_rows(model: nn.Module) -> torch.Tensor:
    """`[B]` bool: whether all that the transformer of the streaming `model` answered since a row's reset was finite.

    A row that is not stays so until it is reset, as its caches are spoilt. Nothing is computed and nothing waits for
    the device; the tensor is a copy. With classifier-free guidance B counts the rows with and without conditions.

    Raises:
        ValueError: when `model` has no TTT layer or is not streaming.
    """
    last = list(require_memories(model).values())[-1]
    if last._streaming_state is None:
        raise ValueError(f"{type(model).__name__} is not streaming: there are no rows outside of a stream.")
    return last._streaming_state.finite.clone()


@torch.no_grad()
def ttt_stats(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What the fast weights did, read from the streaming state itself. Waits for the device: not for every step.

    Returns:
        For the name of each memory, in layer order:
        `updates`: list of ints, updates per row since its last reset;
        `delta_norm`: list of floats, Frobenius norm of the fast weight's change per row;
        `relative_delta`: the same over the norm of what it began with: W_down, or W1, b1, W2 and b2;
        `known`: list of floats from 0 to 1, how much of its last full chunk's targets a row knew already, or None for
            a row without; None altogether unless `ttt_update="residual"`;
        with `ttt_kind="in_place"` `conv_norm`, `W_target_norm`: floats, norms of the target generator's weights; with
        the first 0 nothing is learnt;
        with "mlp" `gating_alpha_norm`, `wo_norm`: floats; with the first 0 nothing is read.
        The first four are None while the model is not streaming.

    Raises:
        ValueError: when `model` has no TTT layer.
    """
    return {name: _layer_stats(memory) for name, memory in require_memories(model).items()}


def _layer_stats(memory: TTTMemory) -> dict[str, Any]:
    stats: dict[str, Any] = {"updates": None, "delta_norm": None, "relative_delta": None}
    state = memory._streaming_state
    if state is not None:
        norms = memory.delta_norm()
        stats["updates"] = state.fast.updates.tolist()
        stats["delta_norm"] = norms.tolist()
        stats["relative_delta"] = (norms / memory.initial_norm().to(norms)).tolist()
    return stats | memory.stats()


def require_memories(model: nn.Module) -> dict[str, TTTMemory]:
    """`ttt_memories`, of which there is at least one.

    Raises:
        ValueError: when `model` has no TTT layer.
    """
    memories = ttt_memories(model)
    if not memories:
        raise ValueError(
            f"{type(model).__name__} has no TTT layer: build it with ttt_enabled=True after moshi_patch.install()."
        )
    return memories
