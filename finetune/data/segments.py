"""The segments of all files that a setting lists; missing files are found here, before any audio is read."""

import hashlib
import logging
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..common.files import is_file
from ..settings.sources import Source, parse_sources
from .broken import BrokenCount, BrokenData
from .manifest import Entry, Problem, read_entries, transcript_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """A stretch of an audio file that starts `first_step` steps into it."""

    path: Path
    first_step: int

    def __str__(self) -> str:
        return f"{self.path} from step {self.first_step}"


class Cutter:
    """Cuts files into segments: what it takes to count the items of a dataset, before any model is there.

    Args:
        duration_sec: of a segment, rounded up to whole steps.
        frame_rate: steps per second.

    Attributes:
        steps: of a segment.
    """

    def __init__(self, duration_sec: float, frame_rate: float):
        self.frame_rate = frame_rate
        self.steps = math.ceil(duration_sec * frame_rate - 1e-6)

    def segments(self, entry: Entry) -> list[Segment]:
        """`entry` cut into segments of `steps` steps; the last may be shorter. At least one."""
        return [Segment(entry.path, first) for first in self.starts(entry)]

    def starts(self, entry: Entry) -> range:
        """The steps of `entry` at which its segments start."""
        return range(0, max(math.ceil(entry.duration * self.frame_rate - 1e-3), 1), self.steps)


class ListDigest(NamedTuple):
    """What one rank sees of a list: a checksum, how many usable segments, and its first problem, or ""."""

    checksum: str
    segments: int
    problem: str


class Listing:
    """The segments of all sources, in the order of their lists, without those whose files are missing.

    A segment is an item at its place in a list: a file that is listed twice counts twice. A line that cannot be read
    counts as one item.

    Args:
        spec: sources, as in `data.train_data`.
        quiet: no warnings about lines and missing files, which every rank finds alike.

    Attributes:
        command: that checks all of it.
        sources: as in `spec`.
        entries: of each source, those lines whose files are there.
        segments: of each source, those of its entries.
        broken: counts the missing ones, of all.
        digests: of each list, by its path; ranks with the same digests have the same items.

    Raises:
        BrokenData: when too many items are missing, or all of one source, or a list cannot be read.
    """

    def __init__(self, spec: str, cutter: Cutter, *, quiet: bool = False):
        self._cutter, self._missing = cutter, []
        seconds = cutter.steps / cutter.frame_rate
        self.command = f"python -m finetune.data check {shlex.quote(spec)} --duration {seconds:.10g}"
        self.digests: dict[str, ListDigest] = {}
        self.sources: list[Source] = parse_sources(spec)
        self.entries = [[entry for file in source.files for entry in self._list(file)] for source in self.sources]
        self.segments = [[one for entry in entries for one in cutter.segments(entry)] for entries in self.entries]
        missing = sum(number for _, number in self._missing)
        total = missing + sum(map(len, self.segments))
        self.broken = BrokenCount(spec, "items", total, f"; `{self.command}` names them all")
        for problem, number in self._missing:
            self.broken.add(str(problem), number)
            if not quiet:
                logger.warning("Skipped: %s", problem)
        self.refuse([len(segments) for segments in self.segments])

    def refuse(self, usable: list[int]) -> None:
        """Raises BrokenData when too many items are broken, or when one source has none of its `usable` items left."""
        verdict = self.broken.verdict()
        if verdict is None and 0 in usable:
            verdict = f"{self.sources[usable.index(0)].name} has no usable item"
        self.broken.refuse(verdict)

    def _list(self, file: Path) -> list[Entry]:
        """The usable lines of one list; remembers its bad lines and the segments of its missing files."""
        try:
            entries, bad = read_entries(file)
        except OSError as error:
            raise BrokenData(f"{file}: cannot be read ({error.strerror}).") from error
        usable: list[Entry] = []
        missing = [(problem, 1) for problem in bad]
        for entry in entries:
            if is_file(entry.path) and is_file(transcript_path(entry.path)):
                usable.append(entry)
            else:
                message = f"{entry.path}: no such file, or no .json beside it"
                missing.append((Problem(entry.file, entry.line, message), len(self._cutter.starts(entry))))
        self._missing += missing
        segments = [segment for entry in usable for segment in self._cutter.segments(entry)]
        checksum = hashlib.sha256(repr((segments, missing)).encode(errors="surrogateescape")).hexdigest()
        self.digests[str(file)] = ListDigest(checksum, len(segments), str(missing[0][0]) if missing else "")
        return usable


def first_difference(digests: list[dict[str, ListDigest]]) -> str | None:
    """In words, the first list of which not all ranks have the same; None when they all have the same items.

    Args:
        digests: those of every rank, in their order.
    """
    for path in sorted({path for ranks in digests for path in ranks}):
        seen = [ranks.get(path) for ranks in digests]
        other = next((rank for rank, digest in enumerate(seen) if digest != seen[0]), None)
        if other is not None:
            first, second = _in_words(seen[0]), _in_words(seen[other])
            return f"{path}: rank 0 has {first}, rank {other} has {'other ones' if first == second else second}"
    return None


def _in_words(digest: ListDigest | None) -> str:
    if digest is None:
        return "no such list"
    return f"{digest.segments} items" + f" ({digest.problem})" * bool(digest.problem)
