"""What people have learnt, between the store and the tick, which never waits for the threads that read and write."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .policy import Policy

logger = logging.getLogger(__name__)

READERS = 16
"""Threads that read at the same time; more are told that the store does not answer."""


class Memories:
    """Reads memories from a store and hands them to its writer, in order for each person.

    Args:
        store: with `read(person) -> (memory, generation)`.
        writer: with `submit(person, memory, generation, done=...)`, `pending(person)`, `forget(person)` and
            `drain(seconds)`.
    """

    def __init__(self, store: Any, writer: Any, policy: Policy):
        self.store, self.writer, self.policy = store, writer, policy
        self._lock = threading.Lock()
        self._reading = 0
        self._generations: dict[str, int] = {}
        self._writing: set[str] = set()
        self._next: dict[str, Mapping[str, torch.Tensor]] = {}
        self._lost: set[str] = set()
        self.last_write = time.monotonic()

    def read(self, person: str, done: Callable[[dict[str, torch.Tensor] | None, str | None], None]) -> None:
        """Reads a memory in another thread, which calls `done(memory, problem)`: None and None for somebody new."""
        with self._lock:
            if self._reading >= READERS:
                problem = "the store of memories does not answer"
            else:
                self._reading, problem = self._reading + 1, None
        if problem:
            done(None, problem)
            return
        threading.Thread(target=self._read, args=(person, done), name="read memory", daemon=True).start()

    def _read(self, person: str, done: Callable[[dict[str, torch.Tensor] | None, str | None], None]) -> None:
        try:
            while self.busy(person):  # what they said last time is on its way
                time.sleep(0.02)
            kept = self.store.read(person)
            with self._lock:
                self._generations[person] = kept.generation
                self._lost.discard(person)
            memory = kept.memory
            if memory is not None and torch.cuda.is_available():
                memory = {key: tensor.pin_memory() for key, tensor in memory.items()}
            done(memory, None)
        except Exception as error:
            logger.error("A memory cannot be read: %s", error)
            done(None, "your memory cannot be read; the server's log says why")
        finally:
            with self._lock:
                self._reading -= 1

    def busy(self, person: str) -> bool:
        """Whether something of this person still is to be written."""
        with self._lock:
            mine = person in self._writing or person in self._next
        return mine or self.writer.pending(person)

    def write(self, person: str, memory: Mapping[str, torch.Tensor]) -> None:
        """Has a copy on the device written, after what is being written of this person. Returns at once."""
        with self._lock:
            if person in self._lost:
                return
            if person in self._writing:
                self._next[person] = memory
                return
            self._writing.add(person)
        event = torch.cuda.Event() if any(tensor.is_cuda for tensor in memory.values()) else None
        if event:
            event.record()
        threading.Thread(target=self._hand_over, args=(person, memory, event), daemon=True).start()

    def _hand_over(self, person: str, memory: Mapping[str, torch.Tensor], event: Any) -> None:
        """Copies to the host on a stream of its own, so that the next tick does not wait for it."""
        if event:
            with torch.cuda.stream(torch.cuda.Stream()) as _:
                event.wait()
                memory = {key: tensor.cpu() for key, tensor in memory.items()}
        with self._lock:
            generation = self._generations.get(person, 0)
        self.writer.submit(person, memory, generation, done=lambda *result: self._written(person, *result))

    def _written(self, person: str, generation: int | None = None, error: Exception | None = None) -> None:
        with self._lock:
            self._writing.discard(person)
            following = self._next.pop(person, None)
            if generation is not None:
                self._generations[person] = generation
                self.last_write = time.monotonic()
            elif type(error).__name__ == "Lost":
                self._lost.add(person)
                following = None
        if error is not None:
            logger.error("A memory was not written: %s", error)
        if following is not None:
            self.write(person, following)

    def forget(self, person: str) -> None:
        """Removes all that is kept of a person, also what is to be written. Asks the store: not for the tick."""
        with self._lock:
            self._next.pop(person, None)
        threading.Thread(target=self._forget, args=(person,), daemon=True).start()

    def _forget(self, person: str) -> None:
        try:
            self.writer.forget(person)
            with self._lock:
                self._generations[person] = self.store.read(person).generation
        except Exception as error:
            logger.error("A memory was not forgotten: %s", error)

    def drain(self, seconds: float) -> None:
        """Waits until all is written, at most so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with self._lock:
                if not self._writing and not self._next:
                    break
            time.sleep(0.02)
        self.writer.drain(max(0.0, deadline - time.monotonic()))
