"""What people have learnt, between the store and the tick, which never waits for the threads that read and write."""

import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from .store_types import Lost, StoreError
from .writer import Writer

logger = logging.getLogger(__name__)

Tensors = Mapping[str, torch.Tensor]
READERS = 64
"""Threads that read at the same time; were there more, the store does not answer."""

CANNOT_BE_READ = "your memory cannot be read; the server's log says why"


class Memories:
    """Reads and writes the memories of people by name. Every method but :meth:`drain` returns at once.

    A person has one row at a time here; that no other server has them is for the store to see.

    Args:
        writer: to the store.
        lost: called, by any thread, with the name of somebody whom another server has written: what they learn here has
            no place any more.
    """

    def __init__(self, writer: Writer, lost: Callable[[str], None] = lambda person: None):
        self.writer, self.lost = writer, lost
        self._changed = threading.Condition()
        self._jobs: queue.SimpleQueue[tuple[str, int, Tensors, Any] | None] = queue.SimpleQueue()
        self._on_the_way: Counter[str] = Counter()  # copies that the writer has not got yet
        self._forgetting: Counter[str] = Counter()
        self._forgotten: Counter[str] = Counter()  # how often: copies from before are not written
        self._parked: dict[str, Tensors] = {}  # to be written when the rest is forgotten
        self._generations: dict[str, int] = {}
        self._reading = 0
        self._last_write = time.monotonic()
        self._thread = threading.Thread(target=self._hand_over, name="memories", daemon=True)
        self._thread.start()

    def busy(self, person: str) -> bool:
        """Whether something of this person still is to be written or forgotten."""
        with self._changed:
            mine = self._on_the_way[person] or self._forgetting[person]
        return bool(mine) or self.writer.pending(person)

    def oldest_s(self) -> float:
        """Seconds that the memory has waited to be written that has waited longest; 0 when none waits."""
        return self.writer.oldest_s()

    def since_last_write_s(self) -> float:
        """Seconds since a memory was last written, or since the beginning."""
        return time.monotonic() - self._last_write

    def read(self, person: str, done: Callable[[dict[str, torch.Tensor] | None, str | None], None]) -> None:
        """Has a thread read a memory and call `done(memory, problem)`: None and None for somebody new."""
        with self._changed:
            self._reading += 1
            too_many = self._reading > READERS
        if too_many:
            self._finish_reading(done, None, "the store of memories does not answer")
        else:
            threading.Thread(target=self._read, args=(person, done), name="read memory", daemon=True).start()

    def _read(self, person: str, done: Callable[[dict[str, torch.Tensor] | None, str | None], None]) -> None:
        try:
            with self._changed:  # the last visit first
                self._changed.wait_for(lambda: not (self._on_the_way[person] or self._forgetting[person]))
            kept = self.writer.read(person)
            memory = kept.memory
            if memory is not None and torch.cuda.is_available():
                memory = {key: tensor.pin_memory() for key, tensor in memory.items()}
            with self._changed:
                self._generations[person] = kept.generation
            problem = None
        except Exception as error:
            logger.error("A memory cannot be read: %s", error)
            memory, problem = None, CANNOT_BE_READ
        self._finish_reading(done, memory, problem)

    def _finish_reading(self, done: Any, memory: dict[str, torch.Tensor] | None, problem: str | None) -> None:
        with self._changed:
            self._reading -= 1
        done(memory, problem)

    def write(self, person: str, memory: Tensors) -> None:
        """Has a memory written.

        Args:
            memory: copied on the device by this thread, for nobody else.
        """
        copied = None
        if any(tensor.is_cuda for tensor in memory.values()):
            copied = torch.cuda.Event()
            copied.record()
        with self._changed:
            self._on_the_way[person] += 1
            self._jobs.put((person, self._forgotten[person], memory, copied))

    def _hand_over(self) -> None:
        """Copies to the host on a stream of its own: on the tick's, the next step would wait for that."""
        stream = None
        while (job := self._jobs.get()) is not None:
            person, times_forgotten, memory, copied = job
            try:
                if copied is not None:
                    stream = stream or torch.cuda.Stream()
                    with torch.cuda.stream(stream):
                        stream.wait_event(copied)
                        memory = {key: tensor.cpu() for key, tensor in memory.items()}
                with self._changed:
                    if self._forgotten[person] != times_forgotten:
                        continue
                    if self._forgetting[person]:
                        self._parked[person] = memory
                        continue
                self._submit(person, memory)
            except Exception:
                logger.exception("A memory was not written.")
            finally:
                with self._changed:
                    self._on_the_way[person] -= 1
                    self._changed.notify_all()

    def _submit(self, person: str, memory: Tensors) -> None:
        with self._changed:
            generation = self._generations.get(person, 0)
        self.writer.submit(person, memory, generation, done=partial(self._written, person))

    def _written(self, person: str, generation: int | None, error: StoreError | None) -> None:
        with self._changed:
            forgotten = self._forgetting[person]
            if generation is not None:
                self._generations[person], self._last_write = generation, time.monotonic()
        if isinstance(error, Lost) and not forgotten:
            self.lost(person)

    def forget(self, person: str) -> None:
        """Has all removed that is kept of a person, and all that was to be written. What comes later is kept anew."""
        with self._changed:
            self._forgotten[person] += 1
            self._parked.pop(person, None)
            self._changed.notify_all()
            if self._forgetting[person]:
                return  # nothing is written before that ends
            self._forgetting[person] += 1
        threading.Thread(target=self._forget, args=(person,), name="forget memory", daemon=True).start()

    def _forget(self, person: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._on_the_way[person])
        self._remove(person)
        with self._changed:
            self._generations[person] = 0
            self._forgetting[person] -= 1
            later = self._parked.pop(person, None)
            self._changed.notify_all()
        if later is not None:
            self._submit(person, later)

    def _remove(self, person: str) -> None:
        """Tries until the store has nothing of a person any more; at once, and for as long again, when asked again."""
        times, until = None, 0.0
        while True:
            if self._forgotten[person] != times:
                times, until = self._forgotten[person], time.monotonic() + self.writer.retry_for_s
            try:
                self.writer.forget(person)
                return
            except Exception as error:
                logger.error("A memory may not be forgotten: %s", error)
            with self._changed:
                asked_again = lambda times=times: self._forgotten[person] != times  # noqa: E731
                if not self._changed.wait_for(asked_again, self.writer.retry_every_s) and time.monotonic() >= until:
                    return

    def close(self, seconds: float) -> None:
        """Waits until all is written, at most so long, and ends."""
        with self._changed:
            left = lambda: sum(self._on_the_way.values()) + sum(self._forgetting.values())  # noqa: E731
            self._changed.wait_for(lambda: not left(), seconds)
        self._jobs.put(None)
        if unwritten := self.writer.close(seconds):
            logger.error("%d memories were not written.", len(unwritten))
