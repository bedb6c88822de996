"""The file of a memory: tensors with a checksum each, and whose they are. Whole or not at all, and read with suspicion.

A safetensors file; its header holds the fingerprint of the model and settings that the fast weights were learnt with.
"""

import contextlib
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

from .config import KINDS, TTTConfig
from .errors import in_one_line
from .json_object import parse_object

FORMAT = "moshi_patch memory 1"
CHECKSUM_BLOCK_BYTES = 1 << 26
"""Bytes that a checksum looks at in one go: what it allocates stays below a few of these."""

LAYER_SELECTION = {"ttt_layers", "ttt_layer_frequency", "ttt_start_layer"}
"""Settings that say in several ways which layers have TTT; a fingerprint names the layers instead."""

NOT_LEARNING = LAYER_SELECTION | {"ttt_initial_gating_alpha", "ttt_scan_checkpoint_group_size"}
"""What a training begins with and how it computes is nothing to a memory either."""


@torch.no_grad()
def write_memory(state: Mapping[str, torch.Tensor], path: str | Path, owner: Mapping[str, Any]) -> None:
    """Writes fast weights to a file for its owner alone. What stood there before is kept until the new one is whole.

    Args:
        state: tensors by name, on any device; waits for it.
        path: in a folder that exists. The unfinished file beside it is called `.NAME.partial`.
        owner: the fingerprint of the model.

    Raises:
        ValueError: when a fast weight is not finite: what it would answer from then on is lost for good.
        OSError: when the file cannot be written; one line with the path and what the system said.
    """
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
    if broken := not_finite(state):
        raise ValueError(f"{path}: not saved, as {first_of(broken)} of the fast weights is not finite.")
    metadata = header_of(state, owner)
    with _words_of_the_system(path, "cannot be written"):
        _write_whole(state, metadata, Path(path).resolve())  # a link stays one


def header_of(state: Mapping[str, torch.Tensor], owner: Mapping[str, Any]) -> dict[str, str]:
    """What the header of a memory says: its format, whose it is, and the checksums of its tensors."""
    return {
        "format": FORMAT,
        "fingerprint": json.dumps(owner),
        "state": json.dumps({key: dtype_shape_checksum(tensor) for key, tensor in state.items()}),
    }


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
def read_memory(path: str | Path, owner: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The fast weights in a file of :func:`write_memory`, bit for bit, on the CPU.

    Args:
        owner: the fingerprint of the model that is to go on with them.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: in one line that names the file and the reason: it is damaged or no memory at all, or belongs to
            other weights or settings, and which.
        OSError: when the file cannot be read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        with _words_of_the_system(path, "cannot be read"), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            require_format(path, metadata)
            saved_by, checksums = (object_in_header(path, metadata, name) for name in ("fingerprint", "state"))
            require_same_model(path, saved_by, owner)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dictionary
    except SafetensorError as error:
        raise ValueError(f"{path}: the file is damaged or cut off: {in_one_line(error)}") from error
    require_as_saved(path, state, checksums)
    return state


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


def object_in_header(path: str | Path, metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """An object in the header of the memory that messages call `path`.

    Raises:
        ValueError: when there is none, or it is anything else.
    """
    try:
        return parse_object(metadata.get(name, ""))
    except ValueError as error:
        raise ValueError(f"{path}: the file is damaged: its {name!r}: {in_one_line(error)}.") from error


def require_format(path: str | Path, metadata: Mapping[str, str]) -> None:
    """That a header is of a memory that this version can read.

    Raises:
        ValueError: when it is not, in one line that begins with `path`.
    """
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: not a memory that this version can read ({FORMAT!r}).")


def require_as_saved(path: str | Path, state: Mapping[str, torch.Tensor], checksums: Mapping[str, Any]) -> None:
    """That tensors are those of which the header has the checksums, and finite.

    Raises:
        ValueError: when they are not, in one line that begins with `path`.
    """
    if {key: dtype_shape_checksum(tensor) for key, tensor in state.items()} != checksums:
        raise ValueError(f"{path}: the file is damaged: its tensors are not those that were saved.")
    if broken := not_finite(state):
        raise ValueError(f"{path}: {first_of(broken)} in the file is not finite.")


def require_same_model(path: str | Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """That two fingerprints are of the same weights and settings.

    Raises:
        ValueError: when they are not, in one line that begins with `path` and says what differs.
    """
    here = json.loads(json.dumps(here))  # lists for tuples, as in the file
    for section in here:
        if not isinstance(saved.get(section), dict):
            found = in_one_line(repr(saved.get(section)))
            raise ValueError(f"{path}: the file is damaged: the {section} in its fingerprint are {found}.")
    settings, model = saved["settings"], here["settings"]
    kinds = [given.get("ttt_kind", KINDS[0]) for given in (settings, model)]
    if kinds[0] != kinds[1]:  # then all else differs too
        settings, model = {"ttt_kind": kinds[0]}, {"ttt_kind": kinds[1]}
    else:  # a setting that an older version did not know had its default
        settings = {**learning_settings(TTTConfig(kind=kinds[1])), **settings}
    reasons = [
        f"{name} is {in_one_line(repr(settings.get(name)))} in the file and {model.get(name)!r} in the model"
        for name in _differing(settings, model)
    ]
    if names := _differing(saved["weights"], here["weights"]):
        number = len(saved["weights"].keys() | here["weights"])
        reasons.append(f"weights differ: {first_of(names)} of {number}")
    if reasons:
        told = in_one_line("; ".join(reasons), 1000)
        raise ValueError(f"{path}: this memory was made with another model or other settings: {told}.")


def learning_settings(config: TTTConfig) -> dict[str, Any]:
    return {key: value for key, value in config.to_kwargs().items() if key not in NOT_LEARNING}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]


def not_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of those that are not finite everywhere."""
    return [key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


def first_of(names: list[str]) -> str:
    return in_one_line(names[0]) + (f" (and {len(names) - 1} more)" if names[1:] else "")


def dtype_and_shape(tensor: torch.Tensor) -> str:
    return f"{dtype_name(tensor.dtype)}{list(tensor.shape)}"


def dtype_name(dtype: torch.dtype) -> str:
    """Without `torch.`, as the fingerprint and the narrowed tensors name it."""
    return str(dtype).removeprefix("torch.")


def dtype_shape_checksum(tensor: torch.Tensor) -> str:
    """Dtype, shape and checksum."""
    return f"{dtype_and_shape(tensor)} {checksum(tensor):016x}"


def checksum(tensor: torch.Tensor) -> int:
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
