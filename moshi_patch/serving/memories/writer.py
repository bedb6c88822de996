"""Writes memories in a thread of its own, so that a store that is slow, full or silent costs the tick nothing."""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from .store import MemoryStore
from .store_types import Kept, Lost, StoreError, Unavailable

logger = logging.getLogger(__name__)

Done = Callable[[int | None, StoreError | None], None]
"""Told the number of the new generation and None, or None and why there is none; mostly from the writer's thread."""

MOST_WAITING = 64
"""Memories that may wait, of one person each: what a store that does not answer costs in memory of the machine."""

RETRY_EVERY_S = 5.0
RETRY_FOR_S = 600.0
"""For how long a write is tried again when the store is not available; one that was lost to another writer never is."""


@dataclass(eq=False)
class _Entry:
    """A memory that waits.

    Attributes:
        dones: of this submission and of those whose place it took.
        waiting_since: when the first of them came, and `submitted`: this one; monotonic.
    """

    memory: Mapping[str, torch.Tensor]
    generation: int
    dones: list[Done]
    waiting_since: float = field(default_factory=time.monotonic)
    submitted: float = field(default_factory=time.monotonic)
    not_before: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)
    why: StoreError | None = None

    def cancel(self, why: StoreError) -> None:
        self.why = why
        self.cancelled.set()


class Writer:
    """Writes to `store`, one memory after the other. Every method may be called from any thread.

    Args:
        most: memories that may wait.
        retry_every_s, retry_for_s: seconds, for a write that the store refuses.
    """

    def __init__(
        self,
        store: MemoryStore,
        most: int = MOST_WAITING,
        retry_every_s: float = RETRY_EVERY_S,
        retry_for_s: float = RETRY_FOR_S,
    ):
        self.store, self.most, self.retry_every_s, self.retry_for_s = store, most, retry_every_s, retry_for_s
        self._waiting: OrderedDict[str, _Entry] = OrderedDict()
        self._now: tuple[str, _Entry] | None = None  # what is being written
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="memory writer", daemon=True)
        self._thread.start()

    def submit(
        self, person: str, memory: Mapping[str, torch.Tensor], generation: int, done: Done | None = None
    ) -> None:
        """Has `memory` written soon; returns at once. Of one person only the latest waits: it takes the place before.

        Args:
            memory: on the CPU, `[1, ...]` each; not to be changed any more.
            generation: what it was learnt on from, as read or as `done` was last told. Behind by what this writer
                wrote itself, it still goes on from that.
            done: `done(generation, error)`, called once: with the generation that holds this memory, or a newer one of
                the same person, and None; or with None and a `StoreError`, `Lost` when somebody else has the person.
        """
        refused = None
        with self._changed:
            before = self._waiting.pop(person, None)
            if self._closed or len(self._waiting) >= self.most:
                reason = "the writer is closed" if self._closed else f"{len(self._waiting)} memories wait for the store"
                refused = StoreError(f"{self.store.name}: not written: {reason}.")
                if before is not None:
                    self._waiting[person] = before
            else:
                entry = self._waiting[person] = _Entry(memory, generation, [done] if done else [])
                if before is not None:
                    entry.dones, entry.not_before = before.dones + entry.dones, before.not_before
                    entry.waiting_since = before.waiting_since
                self._changed.notify_all()
        if refused is not None:
            _tell([done] if done else [], refused)

    def pending(self, person: str) -> bool:
        """Whether something of this person is not written yet: what the store has is older than what was learnt."""
        with self._changed:
            return self._has(person)

    def _has(self, person: str) -> bool:
        return person in self._waiting or (self._now is not None and self._now[0] == person)

    def read(self, person: str, timeout: float = 60.0) -> Kept:
        """What the store has of a person, once nothing of theirs waits any more: not what was before the last visit.

        Waits: not to be called from the tick.

        Raises:
            StoreError: as :meth:`MemoryStore.read`, or when it still waits after so many seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._has(person), timeout):
                raise Unavailable(f"{self.store.name}: the last visit is still not written after {timeout:g} s.")
        return self.store.read(person)

    def oldest_s(self) -> float:
        """Seconds that the longest waiting memory has waited; 0 when nothing waits."""
        with self._changed:
            entries = [*self._waiting.values(), *([self._now[1]] if self._now else [])]
            return max((time.monotonic() - entry.waiting_since for entry in entries), default=0.0)

    def forget(self, person: str) -> int:
        """Removes everything of a person: what waits, what is being written, and every generation in the store.

        Waits for the store, in bounded time: not to be called from the tick. Nothing reappears afterwards; what is
        submitted later with a generation from before is lost; with 0 it is somebody's new memory.

        Returns:
            How many generations the store had.

        Raises:
            StoreError: when the store may still have something.
        """
        with self._changed:
            entry = self._waiting.pop(person, None)
            now = self._now[1] if self._now is not None and self._now[0] == person else None
            forgotten = Lost(f"{self.store.name}: not written: it was forgotten.")
            if now is not None:
                now.cancel(forgotten)
            self._changed.notify_all()
        if entry is not None:
            _tell(entry.dones, forgotten)
        with self._changed:  # a write that hangs is given up by the store itself, and cannot appear any more
            self._changed.wait_for(lambda: now is None or self._now is None or self._now[1] is not now)
        return self.store.forget(person)

    def drain(self, timeout: float) -> list[str]:
        """Waits until everything is written, at most `timeout` seconds; returns whose memories are not."""
        with self._changed:
            for entry in self._waiting.values():
                entry.not_before = 0.0
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and self._now is None, timeout)
            return [*([self._now[0]] if self._now else []), *self._waiting]

    def close(self, timeout: float) -> list[str]:
        """:meth:`drain`, and takes nothing from its beginning on; what is not written then is given up."""
        with self._changed:
            self._closed = True
        left = self.drain(timeout)
        with self._changed:
            given_up = list(self._waiting.values())
            self._waiting.clear()
            ended = StoreError(f"{self.store.name}: not written: the server ended before.")
            if self._now is not None:
                self._now[1].cancel(ended)
            self._changed.notify_all()
        for entry in given_up:
            _tell(entry.dones, ended)
        return left

    def _run(self) -> None:
        while True:
            with self._changed:
                while (person := self._next()) is None:
                    if self._closed and not self._waiting:
                        return
                    self._changed.wait(self._pause())
                entry = self._waiting.pop(person)
                self._now = person, entry
            result = self._write(person, entry)
            with self._changed:
                if entry.why is not None and not isinstance(result, int):
                    result = entry.why
                if result is None:
                    self._now = None
                    self._try_again(person, entry)
                    self._changed.notify_all()
            if result is not None:
                _tell(entry.dones, result)
                with self._changed:
                    self._now = None
                    self._changed.notify_all()

    def _try_again(self, person: str, entry: _Entry) -> None:
        newer = self._waiting.get(person)
        if newer is not None:
            newer.dones, newer.waiting_since = entry.dones + newer.dones, entry.waiting_since
        else:
            entry.not_before = time.monotonic() + self.retry_every_s
            self._waiting[person] = entry

    def _write(self, person: str, entry: _Entry) -> int | StoreError | None:
        """The generation or the error that `done` is told; None: try again."""
        try:
            return self.store.write(person, entry.memory, entry.generation, entry.cancelled, follow=True)
        except Unavailable as error:
            logger.error("%s", error)
            return None if time.monotonic() - entry.submitted < self.retry_for_s else error
        except StoreError as error:
            logger.error("%s", error)
            return error
        except Exception as error:  # the thread must live
            logger.exception("A memory was not written.")
            return StoreError(f"{self.store.name}: not written: {type(error).__name__}.")

    def _next(self) -> str | None:
        now = time.monotonic()
        return next((person for person, entry in self._waiting.items() if entry.not_before <= now), None)

    def _pause(self) -> float | None:
        soonest = min((entry.not_before for entry in self._waiting.values()), default=None)
        return None if soonest is None else max(soonest - time.monotonic(), 0.001)


def _tell(dones: list[Done], result: int | StoreError) -> None:
    failed = isinstance(result, StoreError)
    for done in dones:
        try:
            done(None if failed else result, result if failed else None)
        except Exception:
            logger.exception("Who waited for a memory to be written failed.")
