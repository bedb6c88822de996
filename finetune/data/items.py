"""All items of a dataset: the missing ones are found at the start, broken ones when they are read, too many raise.

An item is a segment at its place in a list: a file that is listed twice counts twice.
"""

import hashlib
import logging
import shlex
from collections import Counter
from collections.abc import Callable

from ..common.errors import UserError
from ..common.files import is_file
from ..settings.sources import Source, parse_sources
from .manifest import Problem, read_entries, transcript_path
from .tokenize import BrokenItem, Cutter, Item, Segment

logger = logging.getLogger(__name__)

BROKEN_SHARE = 0.05
"""A larger share of broken items stops the run."""

SHORT_RUN = 100
"""A run that reads fewer items is judged as if it read so many: one of its first four proves nothing."""

Found = tuple[Segment, str]
"""A broken segment, and what is wrong with it; the text names the file."""

Gather = Callable[[list[Found]], list[Found]]


View = tuple[str, int, str]
"""What one rank has of a list: a checksum, how many usable items, and the first thing that is wrong with it, or ""."""


class BrokenData(UserError, ValueError):
    """Too much of the data is broken to go on, or not all ranks have the same."""


class Items:
    """The segments of all sources in the order of their lists, read one by one; broken ones are remembered.

    Missing and broken items are counted together, each once however often it comes around, against all items of the
    data. A line that cannot be read counts as one item. Each start counts anew: files may have been repaired.

    Args:
        spec: sources, as in `data.train_data`.
        tokenizer: a `SpeechTokenizer`; a `Cutter` is enough to find what is missing, and then nothing can be read.
        planned: how many items all ranks of the run read, if that may be less than an epoch: the items that were found
            broken must then not be more than 5 % of those either, nor of `SHORT_RUN` if that is more.
        gather: makes one list of those of all ranks, so that all know what one has found, and stop together.
        quiet: no warnings about lines and missing files, which every rank finds alike.

    Attributes:
        sources: as in `spec`.
        segments: those of each source; not the ones whose files are missing.
        views: of each list, by its path; ranks with the same views have the same items.

    Raises:
        BrokenData: on construction or from `check`, when more than `BROKEN_SHARE` are broken, or all of one source; or
            on construction, for a list that cannot be read.
    """

    def __init__(
        self,
        spec: str,
        tokenizer: Cutter,
        *,
        planned: int | None = None,
        gather: Gather | None = None,
        quiet: bool = False,
    ):
        self._spec, self._tokenizer = spec, tokenizer
        self._planned, self._gather, self._quiet = planned, gather, quiet
        self._missing, self._broken, self._last = 0, 0, "none"
        self._known: set[Segment] = set()
        self._new: list[Found] = []
        self.views: dict[str, View] = {}
        self.sources: list[Source] = parse_sources(spec)
        self.segments = [self._list(source) for source in self.sources]
        self._places = [Counter(segments) for segments in self.segments]
        self._left = [len(segments) for segments in self.segments]
        self._total = self._missing + sum(self._left)
        self._raise_if_too_many()

    def _list(self, source: Source) -> list[Segment]:
        """The segments of `source`; counts bad lines and the segments of missing files."""
        segments = []
        for file in source.files:
            try:
                entries, bad = read_entries(file)
            except OSError as error:
                raise BrokenData(f"{file}: cannot be read ({error.strerror}).") from error
            usable: list[Segment] = []
            missing = [(problem, 1) for problem in bad]
            for entry in entries:
                found = self._tokenizer.segments(entry)
                if is_file(entry.path) and is_file(transcript_path(entry.path)):
                    usable += found
                else:
                    message = f"{entry.path}: no such file, or no .json beside it"
                    missing.append((Problem(entry.file, entry.line, message), len(found)))
            for problem, number in missing:
                self._miss(problem, number)
            segments += usable
            self.views[str(file)] = _view(usable, missing)
        return segments

    def _miss(self, problem: Problem, number: int) -> None:
        self._missing += number
        self._last = str(problem)
        if not self._quiet:
            logger.warning("Skipped: %s", problem)

    def read(self, segment: Segment) -> Item | None:
        """The item of `segment`; None when it is broken, with a warning that names it the first time."""
        if segment in self._known:
            return None
        try:
            return self._tokenizer(segment)
        except BrokenItem as error:
            logger.warning("Skipped: %s", error)
            self._new.append((segment, str(error)))
            self._note(segment, str(error))
            return None

    @property
    def hopeless(self) -> bool:
        """Whether `check` will raise, as far as this rank knows; it has to be called all the same, by all ranks."""
        return 0 in self._left or self._too_many() is not None

    def check(self) -> None:
        """Tells the other ranks what this one has found; all ranks call it equally often, and all raise or none.

        Raises:
            BrokenData: see the class.
        """
        new, self._new = self._new, []
        for segment, reason in self._gather(new) if self._gather else ():
            self._note(segment, reason)
        self._raise_if_too_many()

    def _note(self, segment: Segment, reason: str) -> None:
        if segment in self._known:
            return
        self._known.add(segment)
        self._last = reason
        for source, places in enumerate(self._places):
            self._left[source] -= places[segment]
            self._broken += places[segment]

    def _too_many(self) -> str | None:
        """In words, if they are."""
        count = self._missing + self._broken
        if count > BROKEN_SHARE * self._total:
            return f"{count} of {self._total} items are broken, more than {BROKEN_SHARE:.0%}"
        if self._planned is not None and self._broken > BROKEN_SHARE * max(self._planned, SHORT_RUN):
            return f"{self._broken} items are broken, more than {BROKEN_SHARE:.0%} of the {self._planned} of this run"
        return None

    def _raise_if_too_many(self) -> None:
        what = self._too_many()
        if what is None and 0 in self._left:
            what = f"{self.sources[self._left.index(0)].name} has no usable item"
        if what is not None:
            command = f"python -m finetune.data check {shlex.quote(self._spec)}"
            raise BrokenData(f"{self._spec}: {what}; `{command}` names them all. The last: {self._last}")


def differing_view(views: list[dict[str, View]]) -> str | None:
    """In words, the first list of which not all ranks have the same; None when they all have the same items.

    Args:
        views: those of every rank, in their order.
    """
    for path in sorted({path for view in views for path in view}):
        seen = [view.get(path) for view in views]
        other = next((rank for rank, view in enumerate(seen) if view != seen[0]), None)
        if other is not None:
            first, second = _in_words(seen[0]), _in_words(seen[other])
            return f"{path}: rank 0 has {first}, rank {other} has {'other ones' if first == second else second}"
    return None


def _view(usable: list[Segment], missing: list[tuple[Problem, int]]) -> View:
    checksum = hashlib.sha256(repr((usable, missing)).encode(errors="surrogateescape")).hexdigest()
    return checksum, len(usable), str(missing[0][0]) if missing else ""


def _in_words(view: View | None) -> str:
    if view is None:
        return "no such list"
    _, number, problem = view
    return f"{number} items" + f" ({problem})" * bool(problem)
