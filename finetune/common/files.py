"""Small files that appear whole or not at all: settings, results, pictures."""

import json
import math
import os
from pathlib import Path
from typing import Any

from .errors import ConfigError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: when there is no such file, or it holds anything else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold an object, not {type(content).__name__}.")
    return content


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
