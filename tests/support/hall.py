"""An engine without sockets, for tests of the model's thread."""

import threading
import time

from moshi_patch.serving.engine.person import Begin, Person, Stage
from moshi_patch.serving.engine.rows import Answer
from moshi_patch.serving.engine.tick import Engine
from tests.support.rows import GREEDY
from tests.support.servers import ANSWER_S


class Hall:
    """An engine, and what it told everybody."""

    def __init__(self, rows, policy=None, memories=None):
        self.engine, self.changed = Engine(rows, policy, memories), threading.Condition()
        self.told: dict[Person, list] = {}
        self.engine.start(self.notify)

    def notify(self, notices):
        with self.changed:
            for person, notice in notices:
                self.told.setdefault(person, []).append(notice)
            self.changed.notify_all()

    def of(self, person, kind) -> list:
        with self.changed:
            return [notice for notice in self.told.get(person, []) if isinstance(notice, kind)]

    def wait(self, person, kind, count=1) -> list:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.of(person, kind)) >= count, ANSWER_S), kind
            return self.of(person, kind)

    def enter(self, sampling=GREEDY, **fields) -> Person:
        person = Person(sampling, **fields)
        assert self.engine.enter(person)
        return person

    def come(self, sampling=GREEDY, **fields) -> Person:
        person = self.enter(sampling, **fields)
        self.wait(person, Begin)
        return person

    def say(self, person, said, pause=0.0) -> list[Answer]:
        """All of it, at the pace of the model, or with so many seconds between two frames; the answers."""
        before = len(self.of(person, Answer))
        for frame in said:
            self.engine.hear(person, [frame], ahead=True)
            while len(person.frames) > 5:
                time.sleep(0.001)
            if pause:
                time.sleep(pause)
        return self.wait(person, Answer, before + len(said))[before:]

    def leave(self, person):
        self.engine.leave(person)
        while person.stage is not Stage.GONE:
            time.sleep(0.001)
