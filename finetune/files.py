"""Small files that appear whole or not at all: settings, results, pictures."""

import json
import math
import os
from pathlib import Path
from typing import Any


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
