"""What a check of a dataset found: all of it as JSON; for people a line per kind and line of a list, or fewer."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINES_SHOWN = 3
"""Of one kind in one list; the others are counted in one line more."""

MESSAGES_KEPT = 3
"""Of one kind in one line of a list, when only people will read them."""

NUMBERS_SHOWN = 10
"""Of lines that are counted together."""

EMPTY_LIST, LOST_WORDS = "empty list", "words that do not become text"
"""Kinds that concern a list as a whole; they stand at its first line."""


@dataclass
class Finding:
    """What is wrong in one way with one line of a list, or with the files that it names.

    Attributes:
        kind: what is wrong, in a few words.
        file, line: where it stands.
        note: whether it does no harm.
        count: how often it is so.
        messages: in detail, the first ones or all.
    """

    kind: str
    file: Path
    line: int
    note: bool
    count: int = 0
    messages: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        more = f" (and {self.count - 1} more of this kind in it)" if self.count > 1 else ""
        return f"{self.file}:{self.line}: {'note: ' * self.note}{self.messages[0]}{more}"


@dataclass
class Segments:
    """How files are cut: how many segments are whole, and the seconds of those that are not."""

    duration: float
    whole: int = 0
    remainders: list[float] = field(default_factory=list)

    def summary(self) -> str:
        number = self.whole + len(self.remainders)
        text = f"{number} segments of {self.duration:g} s, of which {len(self.remainders)} are remainders"
        if not self.remainders:
            return f"{text}."
        tiny = sum(seconds < 0.1 * self.duration for seconds in self.remainders)
        lengths = f"{min(self.remainders):.2f} to {max(self.remainders):.2f} s"
        return f"{text} of {lengths}, {tiny} of them shorter than a tenth; what they lack is filled up, without loss."


@dataclass
class Report:
    """What a check found.

    Args:
        keep_all: keep every message, for JSON.

    Attributes:
        lines: of all lists.
        hours: of audio that could be read.
        words, main_words: those of all speakers, and those that Moshi learns to say.
        segments: None unless asked for.
        text: what becomes of words, by list; empty without a tokenizer.
    """

    keep_all: bool = False
    lines: int = 0
    hours: float = 0.0
    words: int = 0
    main_words: int = 0
    segments: Segments | None = None
    text: dict[str, str] = field(default_factory=dict)
    _findings: dict[tuple[Path, int, str], Finding] = field(default_factory=dict)

    def add(self, file: Path, line: int, kind: str, message: str, *, note: bool = False) -> None:
        """One more thing of a kind that is wrong with a line."""
        finding = self._findings.setdefault((file, line, kind), Finding(kind, file, line, note))
        finding.count += 1
        if self.keep_all or len(finding.messages) < MESSAGES_KEPT:
            finding.messages.append(message)

    @property
    def problems(self) -> int:
        """How many there are, notes not counted."""
        return sum(finding.count for finding in self._findings.values() if not finding.note)

    @property
    def notes(self) -> int:
        return sum(finding.count for finding in self._findings.values() if finding.note)

    def first_problems(self) -> dict[int, str]:
        """What is wrong first with each line of a report on one list; without what concerns the list as a whole."""
        found: dict[int, str] = {}
        for one in self._findings.values():
            if not one.note and one.kind not in (EMPTY_LIST, LOST_WORDS):
                found.setdefault(one.line, one.messages[0])
        return found

    def remarks(self) -> list[str]:
        """What is wrong with lists as a whole, a line for each."""
        return [str(one) for one in self._findings.values() if one.kind in (EMPTY_LIST, LOST_WORDS)]

    def to_text(self) -> str:
        """Lines for people: problems, notes, then the counts."""
        found = sorted(self._findings.values(), key=lambda one: one.note)  # stable: else in the order of the check
        return "\n".join([*_grouped(found), *self._summary()])

    def to_json(self) -> str:
        """All of it; `problems` and `notes` have an entry per message."""
        content: dict[str, Any] = {"problems": [], "notes": []}
        for one in self._findings.values():
            place = {"kind": one.kind, "file": str(one.file), "line": one.line}
            content["notes" if one.note else "problems"] += [place | {"message": text} for text in one.messages]
        counts = {name: getattr(self, name) for name in ("lines", "hours", "words", "main_words", "text")}
        segments = None if self.segments is None else dataclasses.asdict(self.segments)
        return json.dumps(content | counts | {"segments": segments, "ok": not self.problems}, indent=2)

    def _summary(self) -> list[str]:
        lines = [f"{name}: {text}." for name, text in self.text.items()]
        if self.segments is not None:
            lines.append(self.segments.summary())
        words = f"{self.words} words, {self.main_words} of them by SPEAKER_MAIN"
        counts = f"{self.problems} problems, {self.notes} notes."
        return [*lines, f"{self.lines} lines, {self.hours:.3f} hours of audio, {words}; {counts}"]


def _grouped(findings: list[Finding]) -> list[str]:
    """A line for each of the first of a kind in a list, and one for all the others of that kind."""
    groups: dict[tuple[Path, bool, str], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.file, one.note, one.kind), []).append(one)
    lines: list[tuple[Path, bool, int, str]] = []
    for (file, note, kind), ones in groups.items():
        shown, others = ones[:LINES_SHOWN], ones[LINES_SHOWN:]
        lines += [(file, note, one.line, str(one)) for one in shown]
        if others:
            numbers = [str(one.line) for one in others[:NUMBERS_SHOWN]] + ["..."] * (len(others) > NUMBERS_SHOWN)
            more = f"{sum(one.count for one in others)} more in {len(others)} more lines ({', '.join(numbers)})"
            text = f"{'note: ' * note}{kind}: {more}"
            lines.append((file, note, shown[-1].line, f"{file}: {text}"))
    order = list(dict.fromkeys((file, note) for file, note, *_ in lines))
    return [text for _, _, _, text in sorted(lines, key=lambda line: (order.index(line[:2]), line[2]))]
