"""Reads the items of a listing one by one, on all ranks: a broken one is skipped by name, too many stop the run."""

import logging
from collections import Counter
from collections.abc import Callable

from .broken import MAX_BROKEN_SHARE, BrokenItem, is_too_many
from .segments import Listing, Segment
from .tokenize import Item, SpeechTokenizer

logger = logging.getLogger(__name__)

SHORT_RUN = 100
"""A run that reads fewer items is judged as if it read so many: one of its first four proves nothing."""

BrokenSegment = tuple[Segment, str]
"""A broken segment, and what is wrong with it; the text names the file."""

Gather = Callable[[list[BrokenSegment]], list[BrokenSegment]]


class ItemReader:
    """Reads segments, and remembers which are broken, those that other ranks found too.

    Missing and broken items are counted together, each once however often it comes around, against all items of the
    listing. Each start counts anew: files may have been repaired.

    Args:
        planned: how many items all ranks of the run read, if that may be less than an epoch: the items that were found
            broken must then not be more than 5 % of those either, nor of `SHORT_RUN` if that is more.
        gather: makes one list of those of all ranks, so that all know what one has found, and stop together.
    """

    def __init__(
        self,
        listing: Listing,
        tokenizer: SpeechTokenizer,
        *,
        planned: int | None = None,
        gather: Gather | None = None,
    ):
        self.listing, self._tokenizer = listing, tokenizer
        self._planned, self._gather = planned, gather
        self._missing = listing.broken.number
        self._known: set[Segment] = set()
        self._new: list[BrokenSegment] = []
        self._places = [Counter(segments) for segments in listing.segments]
        self._usable = [len(segments) for segments in listing.segments]

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
        return 0 in self._usable or self._too_many_of_this_run() or self.listing.broken.verdict() is not None

    def check(self) -> None:
        """Tells the other ranks what this one has found; all ranks call it equally often, and all raise or none.

        Raises:
            BrokenData: when more than 5 % of the items are broken, or all of one source.
        """
        new, self._new = self._new, []
        for segment, reason in self._gather(new) if self._gather else ():
            self._note(segment, reason)
        self.listing.refuse(self._usable)
        if self._too_many_of_this_run():
            count = self.listing.broken.number - self._missing
            share = f"more than {MAX_BROKEN_SHARE:.0%} of the {self._planned} of this run"
            self.listing.broken.refuse(f"{count} items are broken, {share}")

    def _note(self, segment: Segment, reason: str) -> None:
        if segment in self._known:
            return
        self._known.add(segment)
        for source, places in enumerate(self._places):
            self._usable[source] -= places[segment]
            self.listing.broken.add(reason, places[segment])

    def _too_many_of_this_run(self) -> bool:
        found = self.listing.broken.number - self._missing
        return self._planned is not None and is_too_many(found, max(self._planned, SHORT_RUN))
