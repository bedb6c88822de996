"""The files of a store: `FOLDER/GENERATION`, each created by one writer alone, whole or not at all.

In a folder on this machine a file is written under another name, synced, and then linked to its own: a link fails where
there is one already. Elsewhere the service itself refuses to create what is there (S3: `If-None-Match`).
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from .store_types import Lost

EXCLUSIVE = {"memory", "s3", "s3a"}
"""Protocols whose files can be created such that the second of two writers is told; the local disk aside."""

_CREATING = threading.Lock()


@dataclass(frozen=True, order=True)
class StoredFile:
    """One generation of somebody's memory; in order by person, and then the oldest first.

    Attributes:
        folder: of the person.
        generation: from 1.
        size: in bytes.
        saved: when it was written, in seconds since 1970, by the clock of the store.
    """

    folder: str
    generation: int
    size: int
    saved: float


def open_files(url: str) -> "LocalFiles | RemoteFiles":
    """The files of a store at any URL that `fsspec` knows; a plain path is a folder on this machine.

    Raises:
        ValueError: in one line, when `fsspec` does not know it, or cannot create files exclusively there.
    """
    protocol = url.partition("://")[0] if "://" in url else "file"
    if "::" in url or protocol not in {"file", "local", *EXCLUSIVE}:
        allowed = ", ".join(["a folder", *(f"{name}://" for name in sorted(EXCLUSIVE))])
        raise ValueError(f"{without_secrets(url)}: two servers might write one file there; it must be {allowed}.")
    if protocol in ("file", "local"):
        path = url.partition("://")[2] if "://" in url else url
        if not path or re.match(r"\w+:/", path):  # s3:/ is a URL that was mistyped, and a folder that nobody wants
            raise ValueError(f"{path!r}: must be a folder, or a URL such as s3://BUCKET/FOLDER.")
        return LocalFiles(Path(path))
    try:
        system, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=protocol != "memory")
    except (ImportError, ValueError) as error:
        raise ValueError(f"{without_secrets(url)}: cannot be opened ({error}).") from error
    if not root.strip("/"):
        raise ValueError(f"{without_secrets(url)}: must name a folder.")
    return RemoteFiles(system, root, without_secrets(url))


def without_secrets(url: str) -> str:
    """`url` without a name and password in it."""
    return re.sub(r"://[^/@]*@", "://", url)


def file_name(generation: int) -> str:
    return f"{generation:010d}"


def _generation(name: str) -> int | None:
    return int(name) if re.fullmatch(r"\d{10,18}", name, re.ASCII) and file_name(int(name)) == name else None


class LocalFiles:
    """In a folder on this machine, or on a disk that it mounts; made when the first file is."""

    def __init__(self, root: Path):
        self.root, self.name = root.absolute(), str(root)

    def exists(self) -> bool:
        """Whether there is such a folder."""
        return self.root.is_dir()

    def list(self, folder: str | None = None) -> list[StoredFile]:
        """All whole files, or those of one person, the oldest generation first."""
        found = []
        folders = [folder] if folder else [name for name in _names(self.root) if (self.root / name).is_dir()]
        for one in folders:
            for name in _names(self.root / one):
                generation = _generation(name)
                if generation is not None:
                    with contextlib.suppress(FileNotFoundError):  # removed in between
                        status = (self.root / one / name).stat()
                        found.append(StoredFile(one, generation, status.st_size, status.st_mtime))
        return sorted(found)

    def create(
        self, folder: str, generation: int, size: int, pieces: Iterator[bytes], before: Callable[[], None]
    ) -> None:
        """Makes a file out of `pieces`.

        Args:
            before: called just before the file appears; what it raises keeps it from appearing.

        Raises:
            FileExistsError: when there is one already.
            Lost: when everything of `folder` was removed meanwhile.
        """
        self._make(self.root / folder)
        self._remove_partials(folder, of_the_living=False)
        partial = self.root / folder / f".{file_name(generation)}.{secrets.token_hex(8)}.partial"
        place = partial.with_name(file_name(generation))
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb", 0) as file:
                _lock(file)
                for piece in pieces:
                    _write_all(file, piece)
                os.fsync(file.fileno())
            before()
            try:
                os.link(partial, place)
            except OSError as error:
                if error.errno == errno.ENOENT:  # with all else of this person its unfinished file was removed
                    raise Lost("it was forgotten while it was written.") from error
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise OSError(error.errno, "its disk has no links, by which a file is made by one alone") from error
                raise
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        _sync_folder(self.root / folder)

    def check(self) -> None:
        """Creates a file as :meth:`create` does, and removes it; a name of nobody's folder."""
        folder, number = f".check.{secrets.token_hex(8)}", 1
        try:
            self.create(folder, number, 1, iter([b"x"]), lambda: None)
        finally:
            self.remove(folder, number)
            self.remove_rest(folder)

    @contextlib.contextmanager
    def open(self, folder: str, generation: int) -> Iterator[Callable[[int, int], bytes]]:
        """Gives `read(start, length)` of one file."""
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe would be waited for
        with open(os.open(self.root / folder / file_name(generation), flags), "rb", 0) as file:
            yield lambda start, length: os.pread(file.fileno(), length, start)

    def remove(self, folder: str, generation: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / folder / file_name(generation)).unlink()

    def remove_rest(self, folder: str) -> None:
        """Removes a person's folder and unfinished files; generations must be gone."""
        self._remove_partials(folder, of_the_living=True)
        with contextlib.suppress(FileNotFoundError):
            try:
                place = self.root / folder
                place.unlink() if place.is_symlink() else place.rmdir()
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        with contextlib.suppress(FileNotFoundError):
            _sync_folder(self.root)

    def _remove_partials(self, folder: str, of_the_living: bool) -> None:
        """Unfinished files: what killed writers left, or all; who still writes one is told by the link that fails."""
        for name in _names(self.root / folder):
            partial = self.root / folder / name
            if name.startswith(".") and name.endswith(".partial"):
                with contextlib.suppress(FileNotFoundError):
                    if of_the_living:
                        partial.unlink()
                        continue
                    with partial.open("rb") as file:
                        if _lock(file):
                            partial.unlink()

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            for one in (self.root, folder):
                try:
                    one.mkdir(0o700, parents=True, exist_ok=True)
                except FileExistsError:  # which here would mean another writer
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
                _sync_folder(one.parent)


class RemoteFiles:
    """Where `fsspec` can create a file exclusively."""

    def __init__(self, system: Any, root: str, name: str):
        self.system, self.root, self.name = system, root.rstrip("/"), name

    def exists(self) -> bool:
        """Whether anything is there: folders are names alone."""
        return bool(self.system.exists(self.root))

    def list(self, folder: str | None = None) -> list[StoredFile]:
        """As :meth:`LocalFiles.list`."""
        place = f"{self.root}/{folder}" if folder else self.root
        found = []
        try:
            entries = self.system.find(place, detail=True, refresh=True)
        except FileNotFoundError:
            return []
        for path, entry in entries.items():
            one, _, name = path.strip("/").removeprefix(self.root.strip("/") + "/").partition("/")
            generation = _generation(name)
            if generation is not None:
                found.append(StoredFile(one, generation, int(entry["size"]), _seconds(entry)))
        return sorted(found)

    def create(
        self, folder: str, generation: int, size: int, pieces: Iterator[bytes], before: Callable[[], None]
    ) -> None:
        """As :meth:`LocalFiles.create`. Holds the whole file meanwhile, as an upload may have to be sent again."""
        content, filled = bytearray(size), 0
        for piece in pieces:
            content[filled : filled + len(piece)] = piece
            filled += len(piece)
        before()
        local = _CREATING if self.system.protocol == "memory" else contextlib.nullcontext()
        with local:  # in memory it looks first, and then creates
            self.system.pipe_file(self._path(folder, generation), content, mode="create")

    def check(self) -> None:
        """As :meth:`LocalFiles.check`."""
        folder, number = f".check.{secrets.token_hex(8)}", 1
        self.create(folder, number, 1, iter([b"x"]), lambda: None)
        self.remove(folder, number)

    def open(self, folder: str, generation: int) -> contextlib.AbstractContextManager[Callable[[int, int], bytes]]:
        """As :meth:`LocalFiles.open`."""
        path = self._path(folder, generation)
        return contextlib.nullcontext(lambda start, length: self.system.cat_file(path, start=start, end=start + length))

    def remove(self, folder: str, generation: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._path(folder, generation))

    def remove_rest(self, folder: str) -> None:
        """As :meth:`LocalFiles.remove_rest`; there are no unfinished files, and folders are names alone."""
        with contextlib.suppress(OSError, NotImplementedError):
            self.system.rmdir(f"{self.root}/{folder}")

    def _path(self, folder: str, generation: int) -> str:
        return f"{self.root}/{folder}/{file_name(generation)}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _lock(file: Any) -> bool:
    """Whether nobody else holds `file`: the system frees it with its process, killed or not."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # also a disk without locks
        return False
    return True


def _write_all(file: Any, piece: bytes) -> None:
    view = memoryview(piece)
    while len(view):
        view = view[file.write(view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some disks on a network sync no folders
            raise
    finally:
        os.close(descriptor)


def _seconds(entry: dict[str, Any]) -> float:
    when = next((entry[key] for key in ("LastModified", "mtime", "created", "updated") if entry.get(key)), 0.0)
    return when.timestamp() if isinstance(when, datetime) else float(when)
