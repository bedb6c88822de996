"""A memory as a row of small pieces of bytes, for stores that are no folders: no second copy of it, and no long pause.

The bytes are those of a safetensors file, the same as :mod:`.memory_file` writes: eight bytes for the length of the
header, the header in JSON, the tensors. The library itself takes and gives whole files, and copies them while no other
thread may run.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import in_one_line
from .json_object import parse_object
from .memory_file import (
    dtype_and_shape,
    dtype_name,
    first_of,
    header_of,
    not_finite,
    object_in_header,
    require_as_saved,
    require_format,
    require_same_model,
)

PIECE = 1 << 20
LARGEST_HEADER = 1 << 24
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NARROWED = {"float32": torch.float32, "float64": torch.float64}
"""What a tensor that is stored as bfloat16 may have been before."""


@dataclass(frozen=True)
class Header:
    """What stands before the tensors.

    Attributes:
        length: bytes of all of it.
        metadata: texts by name.
        tensors: dtype and shape by name, in the order in which they are stored.
    """

    length: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def size(self) -> int:
        """Bytes of the whole memory."""
        return self.length + sum(_bytes(dtype, shape) for dtype, shape in self.tensors.values())


@torch.no_grad()
def memory_pieces(
    state: Mapping[str, torch.Tensor], owner: Mapping[str, Any], notes: Mapping[str, str], narrow: bool = False
) -> tuple[int, Iterator[bytes]]:
    """The bytes of a memory: how many, and an iterator of pieces of at most 1 MiB, made as they are asked for.

    Args:
        state: tensors by name, on the CPU, not to be changed meanwhile.
        owner: the fingerprint of the model.
        notes: what the header says besides.
        narrow: store the deltas as bfloat16, with half the bytes.

    Raises:
        ValueError: when a fast weight is not finite, before anything is made.
    """
    if broken := not_finite(state):
        raise ValueError(f"not saved, as {first_of(broken)} of the fast weights is not finite.")
    narrowed = {key: dtype_name(t.dtype) for key, t in state.items() if narrow and _may_be_narrow(key, t)}
    state = {key: (t.bfloat16() if key in narrowed else t).detach().contiguous() for key, t in state.items()}
    if broken := not_finite({key: state[key] for key in narrowed}):
        raise ValueError(f"not saved, as {first_of(broken)} of the fast weights is too large for bfloat16.")
    order = sorted(state, key=lambda key: (-state[key].element_size(), key))  # each begins where its dtype may
    content: dict[str, Any] = {"__metadata__": {**header_of(state, owner), **notes, "narrowed": json.dumps(narrowed)}}
    end = 0
    for key in order:
        begin, end = end, end + state[key].nbytes
        content[key] = {"dtype": _name(state[key].dtype), "shape": list(state[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for key in order:
            view = memoryview(state[key].view(-1).view(torch.uint8).numpy())
            for begin in range(0, len(view), PIECE):
                yield bytes(view[begin : begin + PIECE])

    return 8 + len(text) + end, pieces()


class MemoryReader:
    """Reads a memory from pieces, of any sizes, with suspicion.

    Args:
        name: what messages call it.
        size: of all pieces in bytes.

    Raises:
        ValueError: from every method, in one line that begins with `name`.
    """

    def __init__(self, name: str, size: int, pieces: Iterable[bytes]):
        self.name, self.size = name, size
        self._pieces = iter(pieces)
        self._waiting = memoryview(b"")
        self.header = self._read_header()

    def _read_header(self) -> Header:
        length = int.from_bytes(self._take(8), "little")
        if not 2 <= length <= min(LARGEST_HEADER, self.size - 8):
            raise self._damaged(f"its header has {length} bytes")
        try:
            content = parse_object(self._take(length))
        except ValueError as error:
            raise self._damaged(f"its header: {in_one_line(error)}") from error
        metadata = content.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
            metadata = {}
        require_format(self.name, metadata)
        header = Header(8 + length, metadata, self._layout(content))
        if header.size != self.size:
            raise self._damaged(f"it has {self.size} bytes and says {header.size}")
        return header

    def _layout(self, content: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        found, end = {}, 0
        try:
            entries = sorted(content.items(), key=lambda entry: entry[1]["data_offsets"])
            for key, entry in entries:
                dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
                fits = len(shape) <= 8 and all(type(length) is int and 0 <= length < 1 << 48 for length in shape)
                begin, end = end, end + (_bytes(dtype, shape) if fits else -1)
                if not fits or entry["data_offsets"] != [begin, end]:
                    raise ValueError
                found[key] = (dtype, shape)
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged("its header tells no tensors that lie side by side") from error
        return found

    @torch.no_grad()
    def read(self, owner: Mapping[str, Any] | None, live: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """The fast weights, on the CPU, as they were before a narrow storage.

        Args:
            owner: the fingerprint of the model that is to go on with them; None: any.
            live: what this model streams, whose rows they must fit; None: any.
        """
        header = self.header
        saved_by, checksums, before = (
            object_in_header(self.name, header.metadata, name) for name in ("fingerprint", "state", "narrowed")
        )
        if owner is not None:
            require_same_model(self.name, saved_by, owner)
        for key, dtype in before.items():
            known = key in header.tensors and header.tensors[key][0] == torch.bfloat16
            if not known or not isinstance(dtype, str) or dtype not in NARROWED:
                raise self._damaged(f"its 'narrowed': {in_one_line(repr(dtype))}")
        if live is not None:
            self._require_fitting(live, before)
        state = {key: self._tensor(*kind) for key, kind in header.tensors.items()}
        if any(len(piece) for piece in self._pieces) or len(self._waiting):
            raise self._damaged("it is longer than it says")
        require_as_saved(self.name, state, checksums)
        return {key: t.to(NARROWED[before[key]]) if key in before else t for key, t in state.items()}

    def _require_fitting(self, live: Mapping[str, torch.Tensor], before: Mapping[str, str]) -> None:
        """Before anything of the size that the header tells is allocated."""
        tensors = self.header.tensors
        if names := sorted(tensors.keys() ^ live.keys()):
            raise ValueError(f"{self.name}: the memory is of other layers: {first_of(names)} is in one of the two.")
        for key, tensor in live.items():
            dtype, shape = tensors[key]
            dtype = NARROWED.get(before.get(key, ""), dtype)
            if dtype != tensor.dtype or shape[1:] != tuple(tensor.shape[1:]) or shape[:1] not in ((1,), (2,)):
                stored = f"{dtype_name(dtype)}{list(shape)} in it and {dtype_and_shape(tensor)} in the model."
                raise ValueError(f"{self.name}: {in_one_line(key)} is {stored}")

    def _tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        flat = torch.empty(_bytes(dtype, shape), dtype=torch.uint8)
        view = memoryview(flat.numpy())
        filled = 0
        while filled < len(view):
            piece = self._next(len(view) - filled)
            view[filled : filled + len(piece)] = piece
            filled += len(piece)
        if dtype == torch.bool and (flat > 1).any():
            raise self._damaged("a switch in it is neither on nor off")
        return flat.view(dtype).view(shape)

    def _take(self, length: int) -> bytes:
        taken = bytearray()
        while len(taken) < length:
            taken += self._next(length - len(taken))
        return bytes(taken)

    def _next(self, most: int) -> memoryview:
        while not len(self._waiting):
            try:
                self._waiting = memoryview(next(self._pieces))
            except StopIteration:
                raise self._damaged("it ends too early") from None
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
        piece, self._waiting = self._waiting[:most], self._waiting[most:]
        return piece

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(f"{self.name}: the file is damaged or cut off: {reason}.")


def is_delta(key: str) -> bool:
    """Whether a tensor of a memory is what was learnt, and most of it; the others are what is being learnt from."""
    return key.rpartition(".")[2].startswith("delta")


def _may_be_narrow(key: str, tensor: torch.Tensor) -> bool:
    return is_delta(key) and dtype_name(tensor.dtype) in NARROWED


def _bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * math.prod(shape)


def _name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)
