"""SHA-256 of a checkpoint's files: a flipped bit in a weight is a valid safetensors file, and only a checksum sees it.

They lie in `SHA256SUMS` beside the files, as `sha256sum -c SHA256SUMS` reads it.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import ConfigError

CHECKSUMS = "SHA256SUMS"
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
BLOCK = 1 << 22
"""Bytes read at a time."""


def write_checksums(folder: Path, names: Iterable[str]) -> None:
    """Writes `SHA256SUMS` of the files `names` in `folder`; reads them once."""
    (folder / CHECKSUMS).write_text("".join(f"{_sha256(folder / name)}  {name}\n" for name in names))


def read_checksums(folder: Path) -> dict[str, str] | None:
    """The recorded sum of each file by its name; None when there is no `SHA256SUMS`.

    Raises:
        ConfigError: when it holds anything else than sums, or none.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    lines = [line for line in path.read_text(errors="replace").splitlines() if line]
    matches = [LINE.fullmatch(line) for line in lines]
    if not lines or not all(matches):
        raise ConfigError(f"{path}: is damaged: it must hold lines of a SHA-256 and the name of a file.")
    return {match[2]: match[1] for match in matches if match}


def changed_files(folder: Path, recorded: dict[str, str]) -> list[str]:
    """Names of the files whose content is not what was recorded, missing ones included; reads each once."""
    return [
        name for name, value in recorded.items() if not (folder / name).is_file() or _sha256(folder / name) != value
    ]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:  # hashlib.file_digest needs Python 3.11
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
