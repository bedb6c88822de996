"""SHA-256 of a checkpoint's files: a flipped bit in a weight is a valid safetensors file, and only a checksum sees it.

They lie in `SHA256SUMS` above or beside the files, as `sha256sum -c SHA256SUMS` reads it.
"""

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from .errors import ConfigError

CHECKSUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
BLOCK = 1 << 22
"""Bytes read at a time."""

THREADS = 8
"""Files read at a time: hashing leaves Python's lock alone."""


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Writes `SHA256SUMS` of the files `names` in `folder`; reads them once."""
    names = list(names)
    sums = _sums([folder / name for name in names])
    (folder / CHECKSUMS).write_text("".join(f"{value}  {name}\n" for name, value in zip(names, sums, strict=True)))


def read_checksums(folder: Path) -> dict[str, str] | None:
    """The recorded sum of each file by its name; None when there is no `SHA256SUMS`.

    Raises:
        ConfigError: when it holds anything else than sums of files in `folder`, or none.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    lines = [line for line in path.read_text(errors="replace").splitlines() if line]
    matches = [LINE.fullmatch(line) for line in lines]
    if not lines or not all(matches):
        raise ConfigError(f"{path}: is damaged: it must hold lines of a SHA-256 and the name of a file.")
    recorded = {match[2]: match[1] for match in matches if match}
    for name in recorded:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ConfigError(f"{path}: is damaged: {name!r} is no file of that folder.")
    return recorded


def changed_files(folder: Path, recorded: dict[str, str]) -> list[str]:
    """Names of the files whose content is not what was recorded, missing ones included; reads each once."""
    present = [name for name in recorded if (folder / name).is_file()]
    found = dict(zip(present, _sums([folder / name for name in present]), strict=True))
    return [name for name, value in recorded.items() if found.get(name) != value]


def other_than_saved(folder: Path, recorded: dict[str, str]) -> list[str]:
    """A sentence for each of :func:`changed_files`."""
    return [
        f"{folder / name} is not what was saved (SHA-256)."
        if (folder / name).is_file()
        else f"{folder / name} is not there, and was saved."
        for name in changed_files(folder, recorded)
    ]


def _sums(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(_sha256, paths))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest needs Python 3.11
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
