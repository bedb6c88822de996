"""Keeping what a stream has learnt: the fast weights of some rows, in a file or for another row.

A memory is every tensor of every TTT layer's streaming state: the delta, the unfinished chunk, positions. The
attention's cache is not in it, so a conversation goes on with its memory and an empty window. It means something to the
model and settings alone that it was learnt with: a file says which (:mod:`.memory_file`).

Shapes: `B` rows of the stream.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .kinds.memory import TTTMemory
from .memory_file import dtype_and_shape, dtype_shape_checksum, learning_settings, read_memory, write_memory
from .model import stock_name, ttt_memories


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What the fast weights of `model` mean anything with: its TTT settings and all of its weights. JSON-ready.

    Reads every weight once. The same weights give the same fingerprint on every device; adapters that were merged on
    another device, in another order of operations, may not.

    Returns:
        `settings`: the `ttt_*` keyword arguments, the selection of layers replaced by `layers`, their memories' names;
        `weights`: for each name in the `state_dict`, dtype, shape and a 64-bit checksum as one string.

    Raises:
        ValueError: when `model` has no TTT layer.
    """
    memories = _memories_by_stock_name(model)
    settings = learning_settings(next(iter(memories.values())).config)
    weights = {stock_name(name): dtype_shape_checksum(tensor) for name, tensor in model.state_dict().items()}
    return {"settings": {"layers": list(memories), **settings}, "weights": weights}


def save_memory(
    model: nn.Module, path: str | Path, known: Mapping[str, Any] | None = None, rows: Sequence[int] | None = None
) -> None:
    """Write the fast weights of the streaming `model` to `path`, for :func:`load_memory`. Waits for the device.

    The file appears whole or not at all, is readable by its owner alone, and what stood there before is kept until
    then. Only one process may write to a path at a time.

    Args:
        path: in a folder that exists. The unfinished file beside it is called `.NAME.partial`.
        known: `fingerprint(model)`, to not read all weights again.
        rows: those to save, from 0; None: all that `model` streams.

    Raises:
        ValueError: when `model` has no TTT layer, is not streaming or has no such row, or when a fast weight is not
            finite: what it would answer from then on is lost for good.
        OSError: when the file cannot be written; one line with the path and what the system said.
    """
    state = fast_weight_tensors(model) if rows is None else copy_memory(model, rows)
    write_memory(state, path, fingerprint(model) if known is None else known)


def load_memory(
    model: nn.Module, path: str | Path, known: Mapping[str, Any] | None = None, rows: Sequence[int] | None = None
) -> None:
    """Give the streaming `model` the fast weights in `path`, in place and bit for bit as they were saved.

    The rest of the streaming state stays as it is: reset it before for a new conversation that remembers. Everything is
    checked before anything is changed.

    Args:
        path: a file of :func:`save_memory`.
        known: `fingerprint(model)`, to not read all weights again.
        rows: those that get them, as many as were saved; None: all that `model` streams.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: in one line that names the file and the reason: it is damaged or no memory at all, belongs to other
            weights or settings (which), or to another number of rows; or `model` is not streaming.
        OSError: when the file cannot be read.
    """
    fast_weight_tensors(model)
    state = read_memory(path, fingerprint(model) if known is None else known)
    try:
        restore_memory(model, state, rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


@torch.no_grad()
def copy_memory(model: nn.Module, rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """Copies of the fast weights of some rows of the streaming `model`, `[len(rows), ...]` each, where the model is.

    Raises:
        ValueError: when `model` has no TTT layer, is not streaming, or has no such row.
    """
    live = fast_weight_tensors(model)
    _require_rows(live, rows)
    # Row by row: an index of numbers would be sent to the device first, and waited for.
    return {key: torch.stack([tensor[row] for row in rows]) for key, tensor in live.items()}


@torch.no_grad()
def restore_memory(model: nn.Module, state: Mapping[str, torch.Tensor], rows: Sequence[int] | None = None) -> None:
    """Gives rows of the streaming `model` the fast weights in `state`, in place; other rows are not touched.

    Args:
        state: as of :func:`copy_memory`, on any device.
        rows: as many as `state` has; None: all that `model` streams.

    Raises:
        ValueError: when they do not fit, before anything is changed; or as :func:`copy_memory`.
    """
    live = fast_weight_tensors(model)
    rows = range(len(next(iter(live.values())))) if rows is None else rows
    check_memory(model, state, rows)
    for key, tensor in live.items():
        for row, saved in zip(rows, state[key], strict=True):
            tensor[row].copy_(saved)


def check_memory(model: nn.Module, state: Mapping[str, torch.Tensor], rows: Sequence[int]) -> None:
    """That :func:`restore_memory` would take the same arguments.

    Raises:
        ValueError: as it.
    """
    live = fast_weight_tensors(model)
    _require_rows(live, rows)
    if state.keys() != live.keys():
        names = sorted(state.keys() ^ live.keys())
        raise ValueError(f"the memory is of other layers: {names[0]} is in one of the two alone.")
    for key, tensor in live.items():
        if state[key].shape != (len(rows), *tensor.shape[1:]) or state[key].dtype != tensor.dtype:
            raise ValueError(
                f"{key} is {dtype_and_shape(state[key])} in the memory and {dtype_and_shape(tensor)} in the model: "
                "stream as many rows as were saved."
            )


def _require_rows(live: Mapping[str, torch.Tensor], rows: Sequence[int]) -> None:
    count = len(next(iter(live.values())))
    for row in rows:
        if not 0 <= row < count:
            raise ValueError(f"row={row}: must be a row of the stream, from 0 to {count - 1}.")
    if not rows or len(set(rows)) < len(rows):
        raise ValueError(f"rows={list(rows)}: must be one or more rows, each once.")


def _memories_by_stock_name(model: nn.Module) -> dict[str, TTTMemory]:
    memories = {stock_name(name): memory for name, memory in ttt_memories(model).items()}
    if not memories:
        raise ValueError(f"{type(model).__name__} has no TTT layer, so there is nothing to remember.")
    return memories


def fast_weight_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of the streaming states of TTT layers, by the name of the memory and of the field: no copies."""
    tensors = {}
    for name, memory in _memories_by_stock_name(model).items():
        if memory._streaming_state is None:
            raise ValueError(f"{type(model).__name__} is not streaming: there are no fast weights outside of a stream.")
        fast = memory._streaming_state.fast
        tensors |= {f"{name}.{field.name}": getattr(fast, field.name) for field in dataclasses.fields(fast)}
    return tensors
