"""Somebody who is connected: the sound of theirs that the model has not heard yet, and what they are told."""

import enum
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .policy import RATE, STEP_S
from .sampler import Sampling


class Stage(enum.Enum):
    """How far somebody has come."""

    WAITING = "waiting for a row"
    READING = "the memory is being read"
    COPYING = "the memory is being copied into the row, a layer a tick"
    TALKING = "talking"
    GONE = "gone"


@dataclass(frozen=True)
class Place:
    """How many people have to leave before this one can talk."""

    place: int


@dataclass(frozen=True)
class Begin:
    """The conversation begins: what is said from now on is heard."""


@dataclass(frozen=True)
class Room:
    """There is room for more sound of this person."""


@dataclass(frozen=True)
class Told:
    """What somebody is told who asked for metadata; JSON-ready."""

    message: dict[str, Any]


@dataclass(frozen=True)
class End:
    """The conversation is over. `code` is that of a websocket's close frame."""

    code: int
    reason: str


class Pace:
    """Whether somebody's sound comes faster than it is spoken: a leaky bucket, which a second of time empties by one.

    The time in which nobody read what they sent does not count. So a file or a flood is told from speech also where
    the model is slow.

    Args:
        slack_s: seconds of sound that may come at once and still count as speech.
    """

    def __init__(self, slack_s: float):
        self.slack_s, self.level_s, self.last = slack_s, 0.0, 0.0

    def hear(self, samples: int, now: float) -> bool:
        """Sound came at the time `now`, seconds of a clock that is never set. Whether it came ahead of its time."""
        self.level_s = max(0.0, self.level_s - max(0.0, now - self.last)) + samples / RATE
        self.last = now
        return self.level_s > self.slack_s

    def resume(self, now: float) -> None:
        """From `now` on it is read again."""
        self.last = now


@dataclass(eq=False)
class Person:
    """One person, from the first message to the last. All but four fields belong to the engine, and its lock.

    Attributes:
        sampling: how their row draws.
        name: under which their memory is kept; None: it is not.
        metadata: whether they asked for messages about themselves.
        guest: whether they talk without a memory when somebody of their name talks already.
        born, since, written, told: when they came, have been in this stage, had their memory written, and were told of
            it; of a clock that is never set.
        place: in the queue, as they were told.
        frames: `[F]` float32 each, with the time at which they came in time, or None when they came ahead of it.
        pending: whether :class:`Room` is due when fewer frames wait.
        dropped: frames that were lost, as the model was slow.
        heard: frames that the model heard since the row began anew.
        step_ms: how long the last one took.
        memory, problem: what the store gave, or why it did not.
        updates, muted: whether they want what they say to be learnt, and whether their row does not.
        forget, forgot: whether they want to be forgotten, and when they last were.
    """

    sampling: Sampling
    name: str | None = None
    metadata: bool = False
    guest: bool = False
    born: float = field(default_factory=time.monotonic)
    stage: Stage = Stage.WAITING
    row: int | None = None
    place: int | None = None
    since: float = 0.0
    frames: deque[tuple[np.ndarray, float | None]] = field(default_factory=deque)
    pending: bool = False
    dropped: int = 0
    heard: int = 0
    step_ms: float = 0.0
    memory: dict[str, Any] | None = None
    problem: str | None = None
    written: float = 0.0
    updates: bool = True
    muted: bool = False
    forget: bool = False
    forgot: float = float("-inf")
    told: float = 0.0

    def take(self, frames: Iterable[np.ndarray], ahead: bool, backlog: int, now: float) -> bool:
        """Adds frames to those that wait. Whether there is room for more; if not, :class:`Room` will say when.

        Args:
            ahead: whether they came ahead of time, as a file does: all of them are heard. Otherwise the oldest are
                dropped of more than `backlog`.
        """
        self.frames.extend((frame, None if ahead else now) for frame in frames)
        if not ahead:
            while len(self.frames) > backlog:
                self.frames.popleft()
                self.dropped += 1
            return True
        self.pending = len(self.frames) >= backlog
        return not self.pending


def late(came: float | None, now: float) -> bool:
    """Whether a frame that came in time was answered later than a step after that."""
    return came is not None and now - came > STEP_S
