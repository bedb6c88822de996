"""Who has which row, who waits for one, and the memory that comes and goes with them. All of it between two steps."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from aiohttp import WSCloseCode

from ..memories.remember import Memories
from .person import Begin, End, Person, Place, Stage
from .policy import Policy
from .rows import Rows

FORGET_EVERY_S = 1.0
"""Who asks to be forgotten more often than that waits: each time the store is asked."""


class Places:
    """Rows and their people. Used under the engine's lock, but for what asks the model, which its thread alone does.

    Args:
        changed: that lock; told when a memory has come.
        post: tells a person something, after this tick.

    Attributes:
        joined: people who have had a row.
        lost: names whose memory another server has written: what is learnt here has no place any more.
    """

    def __init__(
        self,
        rows: Rows,
        policy: Policy,
        memories: Memories | None,
        changed: threading.Condition,
        post: Callable[[Person, Any], None],
    ):
        self.rows, self.policy, self.memories, self.post = rows, policy, memories, post
        self.joined = 0
        self._changed = changed
        self.waiting: deque[Person] = deque()
        self.people: list[Person] = []
        self.leaving: list[Person] = []
        self.lost: set[str] = set()
        self._copying: dict[Person, Iterator[str]] = {}

    def talking(self) -> list[Person]:
        return [person for person in self.people if person.stage is Stage.TALKING]

    def is_full(self) -> bool:
        """Whether a newcomer can neither have a row nor wait for one."""
        return len(self.people) + len(self.waiting) >= self.rows.count + self.policy.queue

    def due_in(self, now: float) -> float:
        """Seconds until :meth:`move` has something to do; 0: now."""
        if self.leaving or self.lost or any(person.stage is Stage.COPYING for person in self.people):
            return 0.0
        if any(person.muted is person.updates for person in self.talking()):
            return 0.0
        if self._next_in_queue() is not None and len(self.people) < self.rows.count:
            return 0.0
        if self._new_places():
            return 0.0
        times = [person.since + self.policy.read_s for person in self.people if person.stage is Stage.READING]
        times += [person.born + self.policy.name_s for person in self.waiting if self._talks_already(person)]
        times += [person.forgot + FORGET_EVERY_S for person in self.talking() if person.forget]
        if self.memories:
            times += [person.written + self.policy.write_s for person in self.talking() if person.name]
        return max(0.0, min(times, default=now + 60.0) - now)

    def move(self, now: float) -> None:
        """Lets people out and in, as many as a tick may, and copies one layer of one memory."""
        for person in self.leaving[: self.policy.joins]:
            self.leaving.remove(person)
            self.let_go(person)
        for person in [person for person in self.people if person.name in self.lost]:
            self.dismiss(person, WSCloseCode.POLICY_VIOLATION, "your memory goes on in another conversation")
        self.lost.clear()
        self._turn_away(now)
        for _ in range(self.policy.joins):
            person = self._next_in_queue()
            if person is None or len(self.people) == self.rows.count:
                break
            self.waiting.remove(person)
            self._let_in(person, now)
        for place, person in self._new_places():
            person.place = place
            self.post(person, Place(place))
        for person in self.talking():
            if person.forget and now >= person.forgot + FORGET_EVERY_S:
                self._start_anew(person, now)
            if person.muted is person.updates and self.rows.learns:
                self.rows.set_updates(person.row, person.updates)
            person.muted = not person.updates
        self._copy_a_layer(now)
        self._write_one(now)

    def _new_places(self) -> list[tuple[int, Person]]:
        """Those who wait for a row, where that is not the place that they were told."""
        if len(self.people) < self.rows.count:
            return []
        return [(place, person) for place, person in enumerate(self.waiting, 1) if person.place != place]

    def _talks_already(self, person: Person) -> bool:
        return person.name is not None and any(other.name == person.name for other in self.people)

    def _next_in_queue(self) -> Person | None:
        return next((person for person in self.waiting if not self._talks_already(person)), None)

    def _turn_away(self, now: float) -> None:
        for person in [person for person in self.waiting if self._talks_already(person)]:
            if now < person.born + self.policy.name_s:
                continue
            if person.guest:
                person.name = None
            else:
                self.leave_queue(person)
                self._end(person, WSCloseCode.POLICY_VIOLATION, "you are talking here already, in another window")
        for person in [person for person in self.people if person.stage is Stage.READING]:
            if now >= person.since + self.policy.read_s:
                self.dismiss(person, WSCloseCode.INTERNAL_ERROR, "the store of memories does not answer")

    def leave_queue(self, person: Person) -> None:
        """Somebody does not wait any more, and gets no row. Who wants to be forgotten is, in another window too."""
        self.waiting.remove(person)
        person.stage = Stage.GONE
        talking = [other for other in self.people if person.name is not None and other.name == person.name]
        if not person.forget or (talking and person.guest):
            return
        for other in talking:
            other.forget = True
        if not talking:
            self.forget(person)

    def _let_in(self, person: Person, now: float) -> None:
        person.row = self.rows.free[0]
        self.rows.join(person.row, person.sampling)
        self.people.append(person)
        self.joined += 1
        person.since = person.written = now
        if person.name and self.memories:
            person.stage = Stage.READING
            self.memories.read(person.name, lambda memory, problem: self.has_read(person, memory, problem))
        else:
            self._begin(person)

    def has_read(self, person: Person, memory: dict[str, Any] | None, problem: str | None) -> None:
        """A memory has come, or will not; called by the thread that read it."""
        with self._changed:
            if person.stage is Stage.READING:
                person.memory, person.problem, person.stage = memory, problem, Stage.COPYING
                self._changed.notify_all()

    def _begin(self, person: Person) -> None:
        person.stage, person.since = Stage.TALKING, time.monotonic()
        self.post(person, Begin())

    def _copy_a_layer(self, now: float) -> None:
        person = next((person for person in self.people if person.stage is Stage.COPYING), None)
        if person is None:
            return
        if person.problem:
            self.dismiss(person, WSCloseCode.INTERNAL_ERROR, person.problem)
            return
        if person.memory is not None:
            try:
                if person not in self._copying:
                    self._copying[person] = self.rows.give_memory(person.row, person.memory)
            except ValueError:
                self.dismiss(person, WSCloseCode.INTERNAL_ERROR, "your memory is of another model")
                return
            if next(self._copying[person], None) is not None:
                return
        self._copying.pop(person, None)
        person.memory = None
        person.written = now
        self._begin(person)

    def _start_anew(self, person: Person, now: float) -> None:
        """Somebody wants to be forgotten, and talks on."""
        self.rows.leave(person.row)
        self.rows.join(person.row, person.sampling)
        person.forgot, person.muted, person.heard = now, False, 0
        self.forget(person)

    def forget(self, person: Person) -> None:
        """Has all removed that is kept of somebody, as they want it."""
        person.forget = False
        if person.name and self.memories:
            self.memories.forget(person.name)

    def _write_one(self, now: float) -> None:
        if not self.memories:
            return
        for person in self.talking():
            if person.name and person.heard and now >= person.written + self.policy.write_s:
                person.written = now
                self.memories.write(person.name, self.rows.copy_memory(person.row))
                return
            if not person.heard:
                person.written = now

    def dismiss(self, person: Person, code: int, reason: str) -> None:
        """Ends a conversation for a reason of the server's. What was learnt since the last write is not kept."""
        self.let_go(person, keep=False)
        self._end(person, code, reason)

    def _end(self, person: Person, code: int, reason: str) -> None:
        person.stage = Stage.GONE
        self.post(person, End(code, reason))

    def let_go(self, person: Person, keep: bool = True) -> None:
        """Takes a row back, with what was learnt in it if it is kept."""
        if person not in self.people:
            return
        if person.forget:
            self.forget(person)
        elif keep and person.name and self.memories and person.heard:
            self.memories.write(person.name, self.rows.copy_memory(person.row))
        self.rows.leave(person.row)
        self.people.remove(person)
        self._copying.pop(person, None)
        person.stage, person.memory = Stage.GONE, None
        person.frames.clear()
