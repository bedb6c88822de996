"""What an evaluation has found so far, kept item by item, so that one that was interrupted goes on where it stopped."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ..common.disk import writing
from ..common.files import finite_or_none, read_json_lines

CONTINUE = "what was found before is intact. Make room, and evaluate again: it goes on where it stopped."


class ResultStore:
    """Finished items in JSON lines, on the disk before the next one begins.

    Each rank appends to a file of its own, `FINGERPRINT-rank0.jsonl`, and reads those of all ranks of the same
    fingerprint, so a later run may have another number of ranks. Results of other settings, weights or data have
    another fingerprint and are never seen. A line that a crash cut short is dropped; its item is evaluated again.

    Args:
        folder: made if it does not exist; shared by all ranks.
        fingerprint: of everything that the results depend on, see :func:`fingerprint`.
    """

    def __init__(self, folder: Path, fingerprint: str, rank: int = 0):
        self.folder, self.fingerprint = folder, fingerprint
        self._path = folder / f"{fingerprint}-rank{rank}.jsonl"
        with writing(folder, CONTINUE):
            folder.mkdir(parents=True, exist_ok=True)
            if self._path.is_file():
                _drop_cut_line(self._path)
        self._known: dict[tuple[str, str], dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Reads what all ranks have written by now."""
        self._known = {}
        for path in sorted(self.folder.glob(f"{self.fingerprint}-rank*.jsonl")):
            lines = (line for line in read_json_lines(path) if _is_whole(line))
            self._known |= {(line["kind"], line["item"]): line["values"] for line in lines}

    def get(self, kind: str, item: str) -> dict[str, Any] | None:
        """The values of an item, None while it has none."""
        return self._known.get((kind, item))

    def add(self, kind: str, item: str, values: dict[str, Any]) -> None:
        """Keeps the values of an item, anything that JSON holds; on the disk when it returns.

        Args:
            kind: what was evaluated, such as `"standard/updates on"`.
            item: id of the item, unique within its kind.
        """
        line = json.dumps({"kind": kind, "item": item, "values": values})
        with writing(self._path, CONTINUE), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._known[kind, item] = json.loads(line)["values"]  # as a later run reads them


def _is_whole(line: dict[str, Any]) -> bool:
    """Whether a line holds a result; one with numbers that are not finite is none, its item is evaluated again."""
    named = isinstance(line.get("kind"), str) and isinstance(line.get("item"), str)
    return named and isinstance(line.get("values"), dict) and finite_or_none(line["values"]) == line["values"]


def fingerprint(**content: Any) -> str:
    """16 hexadecimal digits that differ when anything in `content`, which JSON must hold, does."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_identity(path: Path) -> list[Any]:
    """What tells a file from another or from its earlier self without reading it: name, bytes, time of change."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def tree_identity(path: Path) -> list[Any]:
    """`file_identity` of a file, or of all files in a folder."""
    return [file_identity(file) for file in sorted(path.rglob("*")) if file.is_file()] or file_identity(path)


def _drop_cut_line(path: Path) -> None:
    """So that what is appended starts a line of its own."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
