"""The model's thread: it steps as sound comes, lets people in and out between two steps, and never waits for anyone.

Whatever comes from outside waits with its person, under one lock; whatever goes out is handed to `notify` once a tick.
Nothing else touches the rows.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from aiohttp import WSCloseCode

from ..memories.remember import Memories
from .beat import Beat
from .percentiles import percentiles
from .person import End, Person, Room, Stage, late
from .places import Places
from .policy import Policy
from .rows import Answer, Rows
from .sampler import Sampling
from .watch import Watch

logger = logging.getLogger(__name__)

Notices = list[tuple[Person, Any]]
RECENT_TICKS = 8192
"""Over which the percentiles are taken."""

WARM_UP_STEPS = 8
"""More than the codebooks are delayed, and more than moshi runs before it captures a graph."""


class Engine:
    """Talks with as many people as `rows` has rows.

    Args:
        rows: used by this engine's thread alone from :meth:`start` on.
        policy: what may wait, and how long.
        memories: of people with names; None: nothing is kept.

    Attributes:
        draining: nobody is let in any more.
        failure: why the model cannot go on; everybody has been sent away.
        late_frames: that came in time and were answered later than a step after that.
        dropped_frames: that nobody heard, as the model was slow.
        steps, frames: of the model, and of people in them.
    """

    def __init__(self, rows: Rows, policy: Policy | None = None, memories: Memories | None = None):
        self.rows, self.policy, self.memories = rows, policy or Policy(), memories
        self.draining = False
        self.failure: str | None = None
        self.late_frames = self.dropped_frames = self.steps = self.frames = 0
        self._changed = threading.Condition(threading.RLock())
        self._places = Places(rows, self.policy, memories, self._changed, self._post)
        self._watch = Watch(rows.lm_gen.lm_model, self.policy.metadata_s)
        if memories:
            memories.lost = self._lose
        self._notices: Notices = []
        self._notify: Callable[[Notices], None] = lambda notices: None
        self._ending = False
        self._beat = Beat(self.policy)
        self._ticks = np.zeros(RECENT_TICKS, np.float32)
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._ready = threading.Event()

    def start(self, notify: Callable[[Notices], None]) -> None:
        """Warms the model up and begins. `notify(notices)` is called by the model's thread and must return at once."""
        self._notify = notify
        self._thread.start()
        self._ready.wait()

    def stop(self, seconds: float = 60.0) -> None:
        """Sends everybody away, keeps what they have learnt, and ends."""
        self.end_all(WSCloseCode.GOING_AWAY, "the server is shut down")
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(seconds)
        if self.memories:
            self.memories.close(seconds)

    def enter(self, person: Person) -> bool:
        """Somebody wants to talk: they have a row soon or wait for one. False: there are too many."""
        with self._changed:
            if self.draining or self.failure or self._ending or self._places.is_full():
                return False
            self._places.waiting.append(person)
            self._changed.notify_all()
            return True

    def hear(self, person: Person, frames: Sequence[np.ndarray], ahead: bool) -> bool:
        """Somebody has said `frames`, `[F]` float32 each; nothing happens to those of one who is not to talk yet.

        Args:
            ahead: whether they came faster than they were spoken, see :class:`Pace`.

        Returns:
            Whether there is room for more. If not, :class:`Room` will tell when.
        """
        with self._changed:
            if person.stage is not Stage.TALKING:
                return True
            now, dropped = time.monotonic(), person.dropped
            talking = self._places.talking()
            due = self._beat.due_in(talking, now)
            room = person.take(frames, ahead, self.policy.backlog, now)
            self.dropped_frames += person.dropped - dropped
            if self._beat.due_in(talking, now) < due:  # waking the model's thread costs as much as Opus does
                self._changed.notify_all()
            return room

    def leave(self, person: Person) -> None:
        """Somebody is gone. What they have learnt is kept, if anything is. May be said more than once."""
        with self._changed:
            if person.stage is Stage.WAITING:
                self._places.leave_queue(person)
            elif person.stage is not Stage.GONE and person not in self._places.leaving:
                self._places.leaving.append(person)
            self._changed.notify_all()

    def forget(self, person: Person) -> None:
        """Somebody wants all to be forgotten that they have said, and talks on; once they talk, or as they leave."""
        with self._changed:
            person.forget = person.stage is not Stage.GONE
            self._changed.notify_all()

    def set_updates(self, person: Person, enabled: bool) -> None:
        """Whether what somebody says from now on is learnt."""
        with self._changed:
            person.updates = enabled
            self._changed.notify_all()

    def drain(self) -> None:
        """Lets nobody in any more; who waits is told to come again, and finds another server."""
        with self._changed:
            self.draining = True
            self._turn_all_away("this server is about to stop", WSCloseCode.SERVICE_RESTART)
            self._changed.notify_all()

    def end_all(self, code: int, reason: str) -> None:
        """Ends every conversation; what was learnt is kept."""
        with self._changed:
            self.draining = True
            self._turn_all_away(reason)
            for person in self._places.people:
                self._post(person, End(code, reason))
                if person not in self._places.leaving:
                    self._places.leaving.append(person)
            self._changed.notify_all()

    def _turn_all_away(self, reason: str, code: int = WSCloseCode.TRY_AGAIN_LATER) -> None:
        for person in list(self._places.waiting):
            self._places.leave_queue(person)
            self._post(person, End(code, reason))

    def stats(self) -> dict[str, Any]:
        """What an operator looks at. `tick_ms`: of the latest steps, with all that belongs to a tick."""
        with self._changed:
            ticks = self._ticks[: self.steps].copy()
            people, waiting = len(self._places.people), len(self._places.waiting)
        return {
            "rows": self.rows.count,
            "people": people,
            "free": self.rows.count - people,
            "queue": waiting,
            "tick_ms": percentiles(ticks),
            "late_frames": self.late_frames,
            "dropped_frames": self.dropped_frames,
            "steps": self.steps,
            "frames": self.frames,
            "joined": self._places.joined,
            "oldest_unwritten_s": self.memories and round(self.memories.oldest_s(), 3),
            "since_last_write_s": self.memories and round(self.memories.since_last_write_s(), 3),
            "draining": self.draining,
            "failure": self.failure,
        }

    def _lose(self, name: str) -> None:
        with self._changed:
            self._places.lost.add(name)
            self._changed.notify_all()

    def _post(self, person: Person, notice: Any) -> None:
        self._notices.append((person, notice))

    def _run(self) -> None:
        try:
            with torch.inference_mode():  # a switch of this thread alone
                self._warm_up()
                self._ready.set()
                while self._wait():
                    self._tick()
        except Exception as error:
            logger.exception("The model cannot go on.")
            with self._changed:
                self.failure = f"{type(error).__name__} in the model"
                self._turn_all_away("the model cannot go on")
                for person in self._places.people:
                    if person.forget:
                        self._places.forget(person)
                    person.stage = Stage.GONE
                    self._post(person, End(WSCloseCode.INTERNAL_ERROR, "error in the server"))
                self._places.people.clear()
        finally:
            self._ready.set()
            self._send()

    def _warm_up(self) -> None:
        silence = np.zeros(self.rows.mimi.frame_size, np.float32)
        self.rows.join(0, Sampling())
        for _ in range(WARM_UP_STEPS):
            self.rows.step({0: silence})
        self.rows.step({})  # moshi captures how masks are set at their second change, and nobody shall wait for that
        self.rows.leave(0)
        self.rows.forget()

    def _wait(self) -> bool:
        """Until there is something to do. False: the end."""
        with self._changed:
            while True:
                now = time.monotonic()
                talking = self._places.talking()
                due = min(self._places.due_in(now), self._beat.due_in(talking, now), self._watch.due_in(talking, now))
                if self._ending and not self._places.people:
                    return False
                if due <= 0 or self._notices:
                    return True
                self._changed.wait(due)

    def _tick(self) -> None:
        begin = time.monotonic()
        with self._changed:
            self._places.move(begin)
            talking = self._places.talking()
            frames = self._take_frames(talking) if self._beat.due_in(talking, begin) <= 0 else {}
            if frames:
                self._beat.begin(talking, {person: came for person, (_, came) in frames.items()}, begin)
        self._send()
        if not frames:
            self.rows.forget()
            self._look(talking, begin)
            return
        answers = self.rows.step({person.row: frame for person, (frame, _) in frames.items()})
        with self._changed:
            self._answer(frames, answers)
            self._ticks[self.steps % RECENT_TICKS] = time.monotonic() - begin
            self.steps += 1
        self._send()
        self._look(talking, begin - self.policy.metadata_s)  # who has waited for long gets it while others are answered

    def _look(self, talking: list[Person], now: float) -> None:
        if told := self._watch.look(talking, now):
            self._notify([told])

    def _take_frames(self, talking: list[Person]) -> dict[Person, tuple[np.ndarray, float | None]]:
        frames = {}
        for person in talking:
            if person.frames:
                frames[person] = person.frames.popleft()
                if person.pending and len(person.frames) < self.policy.backlog:
                    person.pending = False
                    self._post(person, Room())
        return frames

    def _answer(self, frames: dict[Person, tuple[np.ndarray, float | None]], answers: dict[int, Answer]) -> None:
        now = time.monotonic()
        for person, (_, came) in frames.items():
            answer = answers[person.row]
            person.heard += 1
            person.step_ms = 1000 * (now - self._beat.last)
            self.frames += 1
            self.late_frames += late(came, now)
            if answer.finite:
                self._post(person, answer)
            else:
                logger.error("A conversation ended, as what the model computes in its row is not finite any more.")
                reason = "the model's numbers are not finite any more"
                self._places.dismiss(person, WSCloseCode.INTERNAL_ERROR, reason)

    def _send(self) -> None:
        with self._changed:
            notices, self._notices = self._notices, []
        if notices:
            self._notify(notices)
