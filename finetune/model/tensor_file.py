"""What a safetensors file holds, read without a model: its header, and its values one tensor at a time."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from ..common.errors import ConfigError

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of torch -> names in a safetensors file."""

SAFETENSORS = (".safetensors", ".sft", ".sfts")
"""Suffixes by which moshi knows such a file; another one is of torch."""

VALUES_AT_A_TIME = 1 << 20

HUGE = 1e6
"""No trained weight is as large; one flipped bit of an exponent makes it so (1e-2 becomes 1e36)."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of a safetensors file describes it; `dtype` as there, such as `"BF16"`."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


@dataclass(frozen=True)
class Size:
    """Of the values of one tensor: Frobenius norm and largest absolute value, both NaN if any is not finite."""

    norm: float
    largest: float
    bytes: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name.

    Raises:
        ConfigError: for a file that is empty, truncated or no safetensors file, and says which.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
            return {name: Stored(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: {_damage(path, error)}") from error


def read_tensors(path: Path, *keys: str) -> tuple[dict[str, tuple[int, ...]], dict[str, Size]]:
    """Shapes and sizes of the tensors in a safetensors file, or under `keys` in one of torch, as moshi reads them.

    Raises:
        ConfigError: when the file cannot be read, or holds anything else.
    """
    if path.suffix in SAFETENSORS:
        return {name: one.shape for name, one in read_header(path).items()}, dict(measure(path))
    try:
        content = torch.load(path, "cpu", weights_only=True)
        for key in keys:
            content = content[key]
        tensors = dict(content)
        return {name: tuple(one.shape) for name, one in tensors.items()}, {k: _size(one) for k, one in tensors.items()}
    except Exception as error:  # a file of anything raises anything
        raise ConfigError(f"{path}: holds no weights that moshi could read ({type(error).__name__}).") from error


def main_dtype(header: dict[str, Stored]) -> str:
    """The precision of most tensors, as in a safetensors file."""
    most = Counter(one.dtype for one in header.values()).most_common(1)
    return most[0][0] if most else ""


def measure(path: Path) -> Iterator[tuple[str, Size]]:
    """The size of the values of each tensor. Reads the file once, mapped to memory; a block of one tensor is copied.

    Raises:
        ConfigError: as `read_header`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            for name in tqdm(file.keys(), desc=path.name, unit="tensor", leave=False, disable=None, delay=5):
                yield name, _size(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: {_damage(path, error)}") from error


def broken_values(sizes: dict[str, Size]) -> list[str]:
    """What is wrong with values of these sizes, one sentence each; empty is good."""
    kinds = {
        "NaN or infinity": [name for name, one in sizes.items() if not math.isfinite(one.norm)],
        f"values above {HUGE:g}": [name for name, one in sizes.items() if one.largest > HUGE],
    }
    return [f"{what} in {some(names)}." for what, names in kinds.items() if names]


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The names of the first few tensors that hold NaN or infinity, and how many more; empty when none does."""
    return some([name for name, tensor in tensors if not math.isfinite(_size(tensor).norm)])


def some(names: list[str], number: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    return ", ".join(names[:number]) + (f" (and {len(names) - number} more)" if len(names) > number else "")


@torch.no_grad()
def _size(tensor: torch.Tensor) -> Size:
    squares, largest = 0.0, 0.0
    if not tensor.is_floating_point():
        tensor = tensor.double()
    for part in tensor.detach().flatten().split(VALUES_AT_A_TIME) if tensor.numel() else ():
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        low, high = wide.aminmax()
        top = max(-low.item(), high.item())  # NaN if any value is
        if not math.isfinite(top):
            return Size(math.nan, math.nan, tensor.nbytes)
        largest = max(largest, top)
        # of large values the squares would not fit into float32
        squares += (wide.double() if top > HUGE else wide).norm().item() ** 2
    return Size(math.sqrt(squares), largest, tensor.nbytes)


def _damage(path: Path, error: Exception) -> str:
    """Why a safetensors file cannot be read: 8 bytes of length, a header of that length, then the tensors."""
    if not path.is_file():
        return "no such file."
    size = path.stat().st_size
    if size == 0:
        return "is empty (0 bytes)."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else {}
            ends = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            return f"is not a safetensors file ({error})."
    if 8 + length > size:
        return f"is truncated, or not a safetensors file: {size} bytes, and its header alone would take {8 + length}."
    if size < whole:
        return f"is truncated: {size} bytes of {whole}."
    return f"is damaged: {error}."
