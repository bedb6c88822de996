"""JSON that was written by anyone: of bounded size and depth, or an error of one line."""

import json
import os
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 26
"""More than any config.json, header or table of results has."""

MAX_DEPTH = 64


def read_object(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: when `path` is not a file, or cannot be read.
        ValueError: as `parse_object`; the message does not name the file.
    """
    if not os.path.isfile(path):  # a pipe would be waited for
        raise FileNotFoundError(2, "No such file or directory", str(path))
    with open(path, "rb") as file:
        return parse_object(file.read(MAX_BYTES + 1))


def parse_object(text: str | bytes) -> dict[str, Any]:
    """The object that `text` holds.

    Raises:
        ValueError: when it holds anything else; as `parse_json`, or for more than `MAX_BYTES`.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"more than {MAX_BYTES >> 20} MiB, which no file of this kind has.")
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"must hold an object, not {type(content).__name__}.")
    return content


def parse_json(text: str | bytes) -> Any:
    """What the JSON in `text` holds.

    Raises:
        ValueError: when it is no JSON, or nested deeper than `MAX_DEPTH`.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH}") from None
    level = [content]
    for _ in range(MAX_DEPTH):
        nested = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [value for values in nested for value in values]
        if not level:
            return content
    raise ValueError(f"nested deeper than {MAX_DEPTH}")
