"""The numbers of a server for many people: how much may wait, how long, and who is told to come again."""

from dataclasses import dataclass

STEP_S = 0.08
"""Seconds of sound that one step of the model hears and says."""

RATE = 24_000
"""Samples per second."""

FRAME = 1920
"""Samples of a step."""


@dataclass(frozen=True)
class Policy:
    """What a server allows; one place for all of it.

    Attributes:
        grace_s: seconds longer than a step that the model waits for somebody who spoke in the last one: a frame that is
            a little late would else miss a step that all others are in.
        pause_s: seconds by which a pause between people's frames must be longer than the one after the steps for these
            to move to its beginning.
        backlog: frames of somebody that may wait for the model. Above it, sound that comes faster than it is spoken
            is not read for now, and of sound that comes in time the oldest is dropped.
        outbox: frames that may wait for somebody to read them, who is sent away above that.
        socket_bytes: that may be on their way to somebody who does not read them, here and in the system's buffer.
        queue: people who may wait for a place.
        joins: people who come or leave in one tick; more of them wait for the next.
        message_bytes: the longest message that is read.
        message_s: the longest sound in one message.
        idle_s: seconds without sound after which somebody loses their place; 0: never.
        name_s: seconds that somebody waits who talks already, as when a page is reloaded.
        read_s: seconds that the store has to give somebody's memory.
        write_s: seconds after which what somebody has learnt is written while they talk on.
        metadata_s: seconds between two messages about somebody's memory.
    """

    grace_s: float = 0.02
    pause_s: float = 0.01
    backlog: int = 6
    outbox: int = 125
    socket_bytes: int = 32 << 10
    queue: int = 8
    joins: int = 2
    message_bytes: int = 4 << 20
    message_s: float = 600.0
    idle_s: float = 30.0
    name_s: float = 3.0
    read_s: float = 10.0
    write_s: float = 300.0
    metadata_s: float = 1.0
