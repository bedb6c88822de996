"""Files and folders that appear whole or not at all, and JSON."""

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import moshi_patch

from .errors import ConfigError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives the name of a file to write, which becomes `path` when the block ends without an error.

    Until then, and for ever if anything fails, what stood at `path` stays as it was.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:  # also when it is interrupted
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a new folder to fill, which becomes `path` when the block ends without an error; `path` must not exist.

    A killed process leaves the folder with its first name, `.tmp-NAME-...`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # a temporary folder is nobody else's
        for item in [*temporary.rglob("*"), temporary]:
            sync(item)
        temporary.rename(path)
        sync(path.parent)
    except BaseException:  # also when it is interrupted
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a small file that appears whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes `content`, which JSON must be able to hold, for people and programs to read; whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def finite_or_none(content: Any) -> Any:
    """`content` as strict JSON can hold it: numbers that are not finite become None."""
    if isinstance(content, dict):
        return {key: finite_or_none(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite_or_none(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


parse_json = moshi_patch.parse_json


def parse_object(line: str | bytes) -> dict[str, Any] | None:
    """The JSON object in `line`; None for anything else, such as a line that a crash cut short."""
    try:
        content = parse_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines, in order; empty when there is no file.

    Left out are lines that hold no object, and a last line without its end: a crash may leave such.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [content for line in lines if (content := parse_object(line)) is not None]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: when there is no such file, or it holds anything else.
    """
    try:
        return moshi_patch.read_object(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def is_file(path: Path) -> bool:
    """Whether there is a file, False also for a name that is too long or may not be looked at."""
    return os.path.isfile(path)


def sync(path: Path) -> None:
    """Waits until `path`, a file or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
