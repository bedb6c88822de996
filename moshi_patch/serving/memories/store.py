"""Everybody's memory, in one place that servers share: each write is a new generation, created by one alone.

The lock is the name: who goes on from generation 7 creates 8, and of two only one can. The loser is told, and stops.
"""

import re
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import in_one_line
from ...memory import fast_weight_tensors, fingerprint
from ...memory_file import dtype_name, object_in_header, write_memory
from .bounded import BoundedCalls
from .generation_file import GenerationToWrite, mark_of, reading
from .new_generation import create_generation, require_newest
from .persons import folder_of, person_of
from .sealing import Sealer
from .store_files import StoredFile, open_files
from .store_types import Kept, Lost, Person, StoreError, Unavailable

Result = TypeVar("Result")

TIMEOUT_S = 30.0
SLOWEST = 8 << 20
"""Bytes per second that a store must manage, beside the timeout: 955 MiB may take two minutes and a half."""

DTYPES = ("float32", "bfloat16")


class MemoryStore:
    """Everybody's memory at a URL. From any threads; every call ends in bounded time, with its result or `StoreError`.

    Args:
        url: a folder, or what `fsspec` knows and can create files exclusively in (`s3://`, `memory://`).
        model: whose memories are kept; read once, all weights. None: any, to look, export and forget.
        key_file: 32 bytes for its owner alone: all is encrypted.
        dtype: `bfloat16` keeps the deltas with half of the bytes; None or `float32`: bit for bit.
        timeout_s: seconds that the store may take for anything, and for each 8 MiB another second.
        known: `fingerprint(model)`, to not read all weights again.

    Raises:
        StoreError: when there can be no such store, or the key cannot be read.
    """

    def __init__(
        self,
        url: str | Path,
        model: nn.Module | None,
        key_file: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        timeout_s: float = TIMEOUT_S,
        known: Mapping[str, Any] | None = None,
    ):
        if (name := str(dtype or "float32").removeprefix("torch.")) not in DTYPES:
            raise StoreError(f"dtype={name}: must be one of {', '.join(DTYPES)}.")
        try:
            self.files = open_files(str(url))
            self._sealer = None if key_file is None else Sealer(key_file)
            self._owner = fingerprint(model) if model is not None and known is None else known
        except (ValueError, OSError) as error:
            raise StoreError(str(error)) from error
        self.model, self.name, self.narrow = model, self.files.name, name == "bfloat16"
        self._calls, self._timeout_s = BoundedCalls(), timeout_s
        self._lock = threading.Lock()
        self._known: dict[str, tuple[int, str]] = {}  # generation and id of what this store read or wrote last
        self._tried: dict[str, set[str]] = defaultdict(set)  # ids of what it wrote, or may have, since it last read

    def check(self) -> None:
        """That the store answers, and can be written to as it must be: to be told before a model is loaded.

        Raises:
            StoreError: when it does not, or cannot.
        """
        self._call("used", lambda stop: self.files.check())

    def require(self) -> None:
        """That there is a store already: nobody should believe that they looked into, or forgot from, another one.

        Raises:
            StoreError: when there is none, or it does not answer.
        """
        if not self._call("found", lambda stop: self.files.exists()):
            raise StoreError(f"{self.name}: there is no such store.")

    def read(self, person: str) -> Kept:
        """The newest memory of a person, checked as in :mod:`moshi_patch.memory_file`.

        Raises:
            StoreError: when it cannot be read, is damaged, another person's or another model's, or needs a key.
        """
        folder = self._folder(person)
        size = max((file.size for file in self._files_of(folder)), default=0)

        def read(stop: threading.Event) -> Kept:
            for _ in range(5):
                files = self.files.list(folder)
                if not files:
                    return self._note(person, Kept(None, 0))
                try:
                    with reading(self.files, files[-1], self._sealer) as reader:
                        kept = Kept(reader.read(self._owner, self._live()), files[-1].generation)
                        return self._note(person, kept, reader.header.metadata.get("id", ""))
                except FileNotFoundError:  # two newer ones were written meanwhile
                    continue
            raise StoreError("its generations are removed faster than they can be read.")

        return self._call("read", read, size)

    def write(
        self,
        person: str,
        memory: Mapping[str, torch.Tensor],
        generation: int,
        cancelled: threading.Event | None = None,
        follow: bool = False,
    ) -> int:
        """Writes `memory` as the generation after `generation`, and removes those before the last two.

        Args:
            memory: on any device; not to be changed meanwhile.
            generation: what the memory was learnt on from: that of :meth:`read`, or what the last write returned.
            cancelled: when set, also from another thread, nothing appears any more.
            follow: go on from what this store wrote since it last read the person, whatever `generation` says: for a
                writer that is told of its success too late, or never.

        Returns:
            Its number.

        Raises:
            Lost: when that generation is there already or was written meanwhile, or when `generation` was removed.
            StoreError: when it cannot be written; what was there stays.
        """
        folder = self._folder(person)
        if isinstance(generation, bool) or not isinstance(generation, int) or generation < 0:
            raise StoreError(f"generation={generation!r}: must be a whole number, 0 or more.")
        if self._owner is None:
            raise StoreError(f"{self.name}: cannot be written without a model.")
        state = {key: tensor.detach().cpu() for key, tensor in memory.items()}
        content = GenerationToWrite(person, folder, state, self._owner, self.narrow)

        def write(stop: threading.Event) -> int:
            given_up = lambda: stop.is_set() or (cancelled is not None and cancelled.is_set())  # noqa: E731
            return self._write(content, generation, follow, given_up)

        return self._call("written", write, sum(tensor.nbytes for tensor in state.values()))

    def _write(self, content: GenerationToWrite, base: int, follow: bool, given_up: Callable[[], bool]) -> int:
        base = self._base(content, base, follow)
        with self._lock:
            self._tried[content.person].add(content.mark)
        target = create_generation(self.files, self._sealer, content, base, given_up)
        with self._lock:
            self._known[content.person], self._tried[content.person] = (target, content.mark), {content.mark}
        return target

    def _base(self, content: GenerationToWrite, base: int, follow: bool) -> int:
        """The generation to go on from, if one can."""
        files = self.files.list(content.folder)
        tried = self._tried[content.person]
        if follow and files and files[-1].generation > base and mark_of(self.files, files[-1], self._sealer) in tried:
            base = files[-1].generation
        require_newest(base, [file.generation for file in files])
        known, mark = self._known.get(content.person, (0, ""))
        if base and base == known and mark and mark_of(self.files, files[-1], self._sealer) not in (mark, None, *tried):
            raise Lost(f"generation {base} is not what it was: it was forgotten, and somebody else began anew.")
        return base

    def forget(self, person: str) -> int:
        """Removes every generation of a person and what unfinished writes left; returns how many generations.

        A write that another server has begun finds its generation gone, and is `Lost`.

        Raises:
            StoreError: when something could not be removed: then it may still be there.
        """
        folder = self._folder(person)

        def forget(stop: threading.Event) -> int:
            removed = 0
            while files := self.files.list(folder):
                for file in files:
                    self.files.remove(folder, file.generation)
                    removed += 1
            self.files.remove_rest(folder)
            return removed

        count = self._call("removed", forget)
        with self._lock:
            self._known.pop(person, None)
            self._tried.pop(person, None)
        return count

    def people(self) -> list[Person]:
        """All who have a memory here, by name. Folders that are nobody's are left out."""
        by_folder: dict[str, list[StoredFile]] = defaultdict(list)
        for file in self._call("listed", lambda stop: self.files.list()):
            by_folder[file.folder].append(file)
        people = []
        for folder, files in by_folder.items():
            if (name := person_of(folder)) is not None:
                sizes = [file.size for file in files]
                generations = tuple(file.generation for file in files)
                people.append(Person(name, generations, sizes[-1], sum(sizes), files[-1].saved))
        return sorted(people, key=lambda person: person.name)

    def show(self, person: str, generation: int | None = None) -> dict[str, Any]:
        """What the header of a generation says, the newest one unless told; no tensor is read.

        Raises:
            StoreError: when there is none, or it cannot be read.
        """
        file = self._find(person, generation)

        def show(stop: threading.Event) -> dict[str, Any]:
            with reading(self.files, file, self._sealer) as reader:
                metadata, tensors = reader.header.metadata, reader.header.tensors
                owner = object_in_header(reader.name, metadata, "fingerprint")
                kinds = {key: (dtype_name(dtype), list(shape)) for key, (dtype, shape) in tensors.items()}
                notes = {key: metadata.get(key) for key in ("person", "saved")}
                return {**notes, "generation": file.generation, "size": file.size, "owner": owner, "tensors": kinds}

        return self._call("read", show)

    def export(self, person: str, path: str | Path, generation: int | None = None) -> None:
        """Writes a generation to a file that :func:`moshi_patch.load_memory` reads, neither encrypted nor narrow.

        Raises:
            StoreError: when there is none, it cannot be read, or the file cannot be written.
        """
        file = self._find(person, generation)

        def export(stop: threading.Event) -> None:
            with reading(self.files, file, self._sealer) as reader:
                state = reader.read(self._owner, None)
                owner = object_in_header(reader.name, reader.header.metadata, "fingerprint")
            try:
                write_memory(state, path, owner)
            except OSError as error:  # of that file, and not of the store
                raise StoreError(str(error)) from error

        self._call("exported", export, file.size)

    def _find(self, person: str, generation: int | None) -> StoredFile:
        files = self._files_of(self._folder(person))
        if not files:
            raise StoreError(f"{self.name}: has nothing of this person.")
        found = {file.generation: file for file in files}
        if generation is not None and generation not in found:
            raise StoreError(f"{self.name}: has no generation {generation} of this person, only {list(found)}.")
        return found[generation or max(found)]

    def _live(self) -> dict[str, torch.Tensor] | None:
        """What the model streams; None while it does not: then a memory is as large as its file alone says."""
        try:
            return None if self.model is None else fast_weight_tensors(self.model)
        except ValueError:
            return None

    def _note(self, person: str, kept: Kept, mark: str = "") -> Kept:
        with self._lock:
            self._tried.pop(person, None)
            self._known[person] = (kept.generation, mark)
        return kept

    def _files_of(self, folder: str) -> list[StoredFile]:
        return self._call("read", lambda stop: self.files.list(folder))

    def _folder(self, person: str) -> str:
        try:
            return folder_of(person)
        except ValueError as error:
            raise StoreError(str(error)) from error

    def _call(self, what: str, function: Callable[[threading.Event], Result], size: int = 0) -> Result:
        try:
            return self._calls.call(function, self._timeout_s + size / SLOWEST)
        except Lost as error:
            raise Lost(f"{self.name}: not {what}: {error}") from error
        except (StoreError, ValueError) as error:
            raise StoreError(f"{self.name}: cannot be {what}: {error}") from error
        except Exception as error:
            reason = (isinstance(error, OSError) and error.strerror) or _without_names(error) or type(error).__name__
            raise Unavailable(f"{self.name}: cannot be {what}: {reason}.") from error


def _without_names(error: Exception) -> str:
    """What a library says, without its addresses: a person's folder is in them."""
    return in_one_line(re.sub(r"[^\s'\"]*(/|%2F)[^\s'\"]*", "...", str(error)))
