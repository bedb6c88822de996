"""Keeping what a stream has learnt: the fast weights in a file, bound to the model and settings they were learnt with.

The file is a safetensors file that holds every tensor of every TTT layer's streaming state: the delta, the unfinished
chunk, positions. The attention's cache is not in it, so a conversation goes on with its memory and an empty window.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .config import TTTConfig
from .model import stock_name, ttt_gatings

FORMAT = "moshi_patch memory 1"
CHECKSUM_BLOCK_BYTES = 1 << 26
"""Bytes that a checksum looks at in one go: what it allocates stays below a few of these."""

LAYER_SELECTION = {"ttt_layers", "ttt_layer_frequency", "ttt_start_layer"}
"""Settings that say in several ways which layers have TTT; a fingerprint names the layers instead."""


@torch.no_grad()
def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What the fast weights of `model` mean anything with: its TTT settings and all of its weights. JSON-ready.

    Reads every weight once. The same weights give the same fingerprint on every device; adapters that were merged on
    another device, in another order of operations, may not.

    Returns:
        `settings`: the `ttt_*` keyword arguments, the selection of layers replaced by `layers`, their gatings' names;
        `weights`: for each name in the `state_dict`, dtype, shape and a 64-bit checksum as one string.

    Raises:
        ValueError: when `model` has no TTT layer.
    """
    gatings = _gatings_by_stock_name(model)
    config = next(iter(gatings.values())).config
    settings = {key: value for key, value in config.to_kwargs().items() if key not in LAYER_SELECTION}
    weights = {stock_name(name): _dtype_shape_checksum(tensor) for name, tensor in model.state_dict().items()}
    return {"settings": {"layers": list(gatings), **settings}, "weights": weights}


@torch.no_grad()
def save_memory(model: nn.Module, path: str | Path, known: Mapping[str, Any] | None = None) -> None:
    """Write the fast weights of the streaming `model` to `path`, for :func:`load_memory`. Waits for the device.

    The file appears whole or not at all, is readable by its owner alone, and what stood there before is kept until
    then. Only one process may write to a path at a time.

    Args:
        model: all rows that it streams are saved.
        path: in a folder that exists. The unfinished file beside it is called `.NAME.partial`.
        known: `fingerprint(model)`, to not read all weights again.

    Raises:
        ValueError: when `model` has no TTT layer or is not streaming, or when a fast weight is not finite: what it
            would answer from then on is lost for good.
        OSError: when the file cannot be written.
    """
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in fast_weight_tensors(model).items()}
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{path}: not saved, as {_first_of(broken)} of the fast weights is not finite.")
    metadata = {
        "format": FORMAT,
        "fingerprint": json.dumps(known if known is not None else fingerprint(model)),
        "state": json.dumps({key: _dtype_shape_checksum(tensor) for key, tensor in state.items()}),
    }
    path = Path(path).resolve()  # a link stays one
    partial = path.with_name(f".{path.name}.partial")
    try:
        # Nobody else may open it, not even while it is being written.
        partial.unlink(missing_ok=True)
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        save_file(state, partial, metadata)
        os.chmod(partial, 0o600)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@torch.no_grad()
def load_memory(model: nn.Module, path: str | Path, known: Mapping[str, Any] | None = None) -> None:
    """Give the streaming `model` the fast weights in `path`, in place and bit for bit as they were saved.

    The rest of the streaming state stays as it is: reset it before for a new conversation that remembers. Everything is
    checked before anything is changed.

    Args:
        model: streams as many rows as were saved.
        path: a file of :func:`save_memory`.
        known: `fingerprint(model)`, to not read all weights again.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming the file and the reason: it is damaged or no memory at all, belongs to other weights or
            settings (which), or to another number of rows; or `model` is not streaming.
    """
    live = fast_weight_tensors(model)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: not a memory that this version can read ({FORMAT!r}).")
            owner, contents = json.loads(metadata["fingerprint"]), json.loads(metadata["state"])
            _require_same_model(path, owner, known if known is not None else fingerprint(model))
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: the file is damaged or cut off: {error}") from error
    if {key: _dtype_shape_checksum(tensor) for key, tensor in saved.items()} != contents or saved.keys() != live.keys():
        raise ValueError(f"{path}: the file is damaged: its tensors are not those that were saved.")
    for key, tensor in live.items():
        if tensor.shape != saved[key].shape or tensor.dtype != saved[key].dtype:
            raise ValueError(
                f"{path}: {key} is {_dtype_and_shape(saved[key])} in the file and {_dtype_and_shape(tensor)} in the "
                "model: stream as many rows as were saved."
            )
    for key, tensor in live.items():
        tensor.copy_(saved[key])


def _gatings_by_stock_name(model: nn.Module) -> dict[str, nn.Module]:
    gatings = {stock_name(name): gating for name, gating in ttt_gatings(model).items()}
    if not gatings:
        raise ValueError(f"{type(model).__name__} has no TTT layer, so there is nothing to remember.")
    return gatings


def fast_weight_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of the streaming states of TTT layers, by the name of the gating and of the field: no copies."""
    tensors = {}
    for name, gating in _gatings_by_stock_name(model).items():
        if gating._streaming_state is None:
            raise ValueError(f"{type(model).__name__} is not streaming: there are no fast weights outside of a stream.")
        fast = gating._streaming_state.fast
        tensors |= {f"{name}.{field.name}": getattr(fast, field.name) for field in dataclasses.fields(fast)}
    return tensors


def _require_same_model(path: str | Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    here = json.loads(json.dumps(here))  # lists for tuples, as in the file
    # What a file does not name was not there when it was made, and the default is how it was then.
    defaults = {key: value for key, value in TTTConfig().to_kwargs().items() if key not in LAYER_SELECTION}
    there = defaults | saved["settings"]
    reasons = [
        f"{key} is {there.get(key)!r} in the file and {here['settings'].get(key)!r} in the model"
        for key in sorted(there.keys() | here["settings"].keys())
        if there.get(key) != here["settings"].get(key)
    ]
    names = sorted(saved["weights"].keys() | here["weights"].keys())
    differing = [name for name in names if saved["weights"].get(name) != here["weights"].get(name)]
    if differing:
        reasons.append(f"weights differ: {_first_of(differing)} of {len(names)}")
    if reasons:
        raise ValueError(f"{path}: this memory was made with another model or other settings: {'; '.join(reasons)}.")


def _first_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _dtype_and_shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _dtype_shape_checksum(tensor: torch.Tensor) -> str:
    """Dtype, shape and checksum."""
    return f"{_dtype_and_shape(tensor)} {_checksum(tensor):016x}"


def _checksum(tensor: torch.Tensor) -> int:
    """64 bits of the tensor's bytes and their order. In whole numbers, hence the same on every device.

    Against accidents, not against forgery.
    """
    total = 0
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for piece in flat.split(CHECKSUM_BLOCK_BYTES):
        words = F.pad(piece, (0, 16 - len(piece) % 8)).view(torch.int64)  # a copy, so that 8 bytes are aligned
        odd = torch.arange(1, 2 * len(words), 2, device=words.device)
        total = (total * 0x9E3779B97F4A7C15 + (words * odd).sum().item() + len(piece)) % (1 << 64)
    return total
