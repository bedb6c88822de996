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


def parse_json(text: str | bytes) -> Any:
    """What the JSON in `text` holds.

    Raises:
        ValueError: when it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("brackets in brackets without end") from error


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
        content = parse_json(path.read_bytes())
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
