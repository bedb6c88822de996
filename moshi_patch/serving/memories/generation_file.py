"""One generation of a memory as a file of a store, plain or sealed: what its header says, and whose it must be."""

import contextlib
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch

from ...errors import in_one_line
from ...memory_stream import PIECE, MemoryReader, memory_pieces
from .persons import person_of
from .sealing import MAGIC, Sealer, is_sealed
from .store_files import LocalFiles, RemoteFiles, StoredFile

Files = LocalFiles | RemoteFiles


@dataclass(frozen=True)
class GenerationToWrite:
    """Everything of a new generation but its number.

    Attributes:
        state: tensors by name, on the CPU.
        owner: the fingerprint of the model.
        narrow: whether deltas are stored as bfloat16.
        mark: by which its writer knows it again.
    """

    person: str
    folder: str
    state: Mapping[str, torch.Tensor]
    owner: Mapping[str, Any]
    narrow: bool = False
    mark: str = field(default_factory=lambda: secrets.token_hex(16))

    def pieces(self, generation: int, sealer: Sealer | None) -> tuple[int, Iterator[bytes]]:
        """How many bytes the file has, and its pieces.

        Raises:
            ValueError: when a fast weight is not finite.
        """
        saved = datetime.now(timezone.utc).isoformat(timespec="seconds")
        notes = {"person": self.person, "generation": str(generation), "id": self.mark, "saved": saved}
        size, pieces = memory_pieces(self.state, self.owner, notes, self.narrow)
        if sealer is None:
            return size, pieces
        return sealer.sealed_size(size), sealer.seal(pieces, _bound_to(self.folder, generation))


@contextlib.contextmanager
def reading(files: Files, file: StoredFile, sealer: Sealer | None) -> Iterator[MemoryReader]:
    """The reader of a stored file, its header read and found to be of this person and generation.

    Raises:
        FileNotFoundError: when it was removed.
        ValueError: in one line that begins with its generation: damaged, another's, or another key is needed.
    """
    name = f"generation {file.generation}"
    with files.open(file.folder, file.generation) as read:
        try:
            size, pieces = _plain(file, read, sealer)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        reader = MemoryReader(name, size, pieces)
        for key, expected in (("person", person_of(file.folder)), ("generation", str(file.generation))):
            if reader.header.metadata.get(key) != expected:
                found = in_one_line(repr(reader.header.metadata.get(key)), 20) if key == "generation" else "another one"
                raise ValueError(f"{name}: the file was moved here: the {key} in its header is {found}.")
        yield reader


def mark_of(files: Files, file: StoredFile, sealer: Sealer | None) -> str | None:
    """By which the writer of a file knows it again; None when it cannot be told."""
    try:
        with reading(files, file, sealer) as reader:
            return reader.header.metadata.get("id")
    except (ValueError, FileNotFoundError):
        return None


def _plain(file: StoredFile, read: Any, sealer: Sealer | None) -> tuple[int, Iterator[bytes]]:
    if sealer is not None:
        return sealer.open(file.size, read, _bound_to(file.folder, file.generation))
    if is_sealed(read(0, min(file.size, len(MAGIC)))):
        raise ValueError("it is encrypted, and can be read with the key that it was written with alone.")
    return file.size, (read(begin, min(PIECE, file.size - begin)) for begin in range(0, file.size, PIECE))


def _bound_to(folder: str, generation: int) -> bytes:
    return f"{folder}/{generation}".encode()
