"""Keeping what a stream has learnt: the fast weights in a file, bound to the model and settings they were learnt with.

The file is a safetensors file that holds every tensor of every TTT layer's streaming state: the delta, the unfinished
chunk, positions. The attention's cache is not in it, so a conversation goes on with its memory and an empty window.
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .config import TTTConfig
from .errors import in_one_line
from .json_object import parse_object
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
    settings = _learning_settings(next(iter(gatings.values())).config)
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
        OSError: when the file cannot be written; one line with the path and what the system said.
    """
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in fast_weight_tensors(model).items()}
    if broken := _not_finite(state):
        raise ValueError(f"{path}: not saved, as {_first_of(broken)} of the fast weights is not finite.")
    metadata = {
        "format": FORMAT,
        "fingerprint": json.dumps(known if known is not None else fingerprint(model)),
        "state": json.dumps({key: _dtype_shape_checksum(tensor) for key, tensor in state.items()}),
    }
    with _words_of_the_system(path, "cannot be written"):
        _write_whole(state, metadata, Path(path).resolve())  # a link stays one


def _write_whole(state: dict[str, torch.Tensor], metadata: dict[str, str], path: Path) -> None:
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
        ValueError: in one line that names the file and the reason: it is damaged or no memory at all, belongs to other
            weights or settings (which), or to another number of rows; or `model` is not streaming.
        OSError: when the file cannot be read.
    """
    live = fast_weight_tensors(model)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with _words_of_the_system(path, "cannot be read"), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: not a memory that this version can read ({FORMAT!r}).")
            owner, checksums = (_object_in_header(path, metadata, name) for name in ("fingerprint", "state"))
            _require_same_model(path, owner, known if known is not None else fingerprint(model))
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
    except SafetensorError as error:
        raise ValueError(f"{path}: the file is damaged or cut off: {in_one_line(error)}") from error
    if {
        key: _dtype_shape_checksum(tensor) for key, tensor in saved.items()
    } != checksums or saved.keys() != live.keys():
        raise ValueError(f"{path}: the file is damaged: its tensors are not those that were saved.")
    for key, tensor in live.items():
        if tensor.shape != saved[key].shape or tensor.dtype != saved[key].dtype:
            raise ValueError(
                f"{path}: {key} is {_dtype_and_shape(saved[key])} in the file and {_dtype_and_shape(tensor)} in the "
                "model: stream as many rows as were saved."
            )
    if broken := _not_finite(saved):
        raise ValueError(f"{path}: {_first_of(broken)} in the file is not finite.")
    for key, tensor in live.items():
        tensor.copy_(saved[key])


@contextlib.contextmanager
def _words_of_the_system(path: str | Path, problem: str) -> Iterator[None]:
    """An OSError inside, also one that safetensors hides in its own, becomes one that names `path` and the reason."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: {problem} ({error.strerror or in_one_line(error)}).") from error
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(f"{path}: {problem} ({os.strerror(int(number[1]))}).") from error


def _object_in_header(path: str | Path, metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """An object in the header of a memory.

    Raises:
        ValueError: when there is none, or it is anything else.
    """
    try:
        return parse_object(metadata.get(name, ""))
    except ValueError as error:
        raise ValueError(f"{path}: the file is damaged: its {name!r}: {in_one_line(error)}.") from error


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
    for section in here:
        if not isinstance(saved.get(section), dict):
            found = in_one_line(repr(saved.get(section)))
            raise ValueError(f"{path}: the file is damaged: the {section} in its fingerprint are {found}.")
    # A setting that an older version did not know had its default.
    settings = {**_learning_settings(TTTConfig()), **saved["settings"]}
    reasons = [
        f"{name} is {in_one_line(repr(settings.get(name)))} in the file and {here['settings'].get(name)!r} in the model"
        for name in _differing(settings, here["settings"])
    ]
    if names := _differing(saved["weights"], here["weights"]):
        number = len(saved["weights"].keys() | here["weights"])
        reasons.append(f"weights differ: {_first_of(names)} of {number}")
    if reasons:
        told = in_one_line("; ".join(reasons), 1000)
        raise ValueError(f"{path}: this memory was made with another model or other settings: {told}.")


def _learning_settings(config: TTTConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_kwargs().items() if key not in LAYER_SELECTION}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


def _first_of(names: list[str]) -> str:
    return in_one_line(names[0]) + (f" (and {len(names) - 1} more)" if names[1:] else "")


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
