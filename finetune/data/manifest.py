"""Reads what users write: `.jsonl` lists of stereo files, and the alignments that lie beside each file."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import parse_json

MAX_DURATION = 1e6
"""Seconds, twelve days: a list that claims more of one file is wrong, and its segments would fill the memory."""

Alignment = tuple[str, tuple[float, float], str]
"""A word, its start and end in seconds, and who says it."""


@dataclass(frozen=True)
class Entry:
    """One line of a list: an audio file and its duration in seconds; `file` and `line` say where it stands."""

    path: Path
    duration: float
    file: Path
    line: int


@dataclass(frozen=True)
class Problem:
    """Something wrong with a line of a list, or with the files that it names."""

    file: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Transcript:
    """The `.json` beside an audio file; alignments in the order they stand there."""

    alignments: list[Alignment]
    text_conditions: dict[str, Any] | None


def read_entries(file: Path) -> tuple[list[Entry], list[Problem]]:
    """The lines of a `.jsonl` list, and those that are not `{"path": ..., "duration": seconds}`; empty lines pass.

    A relative `path` is relative to the folder of `file`. No audio file is looked at.
    """
    entries, problems = [], []
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = parse_json(line)
            path, duration = _check_line(content)
            entries.append(Entry(file.parent / path, duration, file, number))
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ones
            problems.append(Problem(file, number, f"not a valid line: {error}"))
    return entries, problems


def _check_line(content: Any) -> tuple[str, float]:
    if not isinstance(content, dict):
        raise ValueError('must be an object {"path": ..., "duration": seconds}')
    path, duration = content.get("path"), content.get("duration")
    if not isinstance(path, str) or not Path(path).name or not _is_text(path):
        raise ValueError(f"path={in_short(path)}: must be the name of an audio file")
    if not _is_number(duration) or not 0 < duration <= MAX_DURATION:
        raise ValueError(
            f"duration={in_short(duration)}: must be a positive number of seconds, at most {MAX_DURATION:g}"
        )
    return path, float(duration)


def transcript_path(audio: Path) -> Path:
    """`NAME.json` beside `NAME.wav`."""
    return audio.with_suffix(".json")


def read_transcript(path: Path) -> Transcript:
    """Reads and checks a file of alignments.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or an alignment that is not `["word", [start_s, end_s], "SPEAKER"]`; names its index.
    """
    alignments, malformed, conditions = scan_transcript(path)
    if malformed:
        more = f" (and {len(malformed) - 1} more)" if len(malformed) > 1 else ""
        raise ValueError(next(iter(malformed.values())) + more)
    return Transcript(list(alignments.values()), conditions)


def scan_transcript(path: Path) -> tuple[dict[int, Alignment], dict[int, str], dict[str, Any] | None]:
    """The alignments of a file by their index, what is wrong with each malformed one, and the text conditions.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or not an object with a list of alignments.
    """
    content = parse_json(path.read_bytes())
    items = content.get("alignments") if isinstance(content, dict) else None
    if not isinstance(items, list):
        raise ValueError('must be an object with a list "alignments"')
    conditions = content.get("text_conditions")
    if conditions is not None and not isinstance(conditions, dict):
        raise ValueError(f"text_conditions={in_short(conditions)}: must be an object, or absent")
    alignments: dict[int, Alignment] = {}
    malformed: dict[int, str] = {}
    for index, item in enumerate(items):
        match item:
            case [str(word), [start, end], str(speaker)] if _is_text(word) and _is_number(start) and _is_number(end):
                alignments[index] = word, (float(start), float(end)), speaker
            case _:
                must = 'must be ["word", [start_s, end_s], "SPEAKER"]'
                malformed[index] = f"alignments[{index}]={in_short(item)}: {must}"
    return alignments, malformed, conditions


def in_short(value: Any, limit: int = 200) -> str:
    """`value` for a message: users' files may hold pages of text, and brackets in brackets."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # brackets, and whole numbers, of thousands
        return "something without end"
    return text if len(text) <= limit else f"{text[:limit]}..."


def shown(names: Iterable[str], most: int = 5) -> str:
    """Names from users' files for a message: the first `most`, readable on any terminal."""
    names = list(names)
    texts = [name if name.isprintable() and len(name) <= 40 else in_short(name, 40) for name in names[:most]]
    return ", ".join(texts + ["..."] * (len(names) > most))


def _is_text(text: str) -> bool:
    """False for half of a character, which JSON can hold, and no tokenizer and no terminal takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False
