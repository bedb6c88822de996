"""Who wants to be forgotten is, whenever they say it: nothing from before comes back, and what comes after is kept."""

import threading
import time

import pytest

from moshi_patch.serving.person import Begin, Person
from moshi_patch.serving.remember import Memories
from moshi_patch.serving.store import MemoryStore
from moshi_patch.serving.writer import Writer
from tests.moshi_patch.serving.test_tick import Hall
from tests.support.memory_stores import model_and_memory, number_in, other_memory
from tests.support.rows import GREEDY, frames, make_rows
from tests.support.servers import ANSWER_S


@pytest.fixture
def store(patched, tmp_path):
    return MemoryStore(tmp_path / "memories", model_and_memory()[0])


@pytest.fixture
def memory(patched):
    return model_and_memory()[1]


def is_done(memories: Memories, *people: str) -> None:
    deadline = time.monotonic() + ANSWER_S
    while any(memories.busy(person) for person in people):
        assert time.monotonic() < deadline
        time.sleep(0.005)


class HeldUp(Memories):
    """Memories that are handed over to the writer when they may be."""

    def __init__(self, writer):
        self.go = threading.Event()
        super().__init__(writer)

    def _hand_over(self):
        assert self.go.wait(ANSWER_S)
        super()._hand_over()


def test_a_copy_that_is_still_on_its_way_is_forgotten_too(store, memory):
    memories = HeldUp(Writer(store))
    memories.write("Anna", memory)
    memories.write("Ben", memory)
    memories.forget("Anna")
    memories.go.set()
    is_done(memories, "Anna", "Ben")
    assert [person.name for person in store.people()] == ["Ben"]


def test_of_what_comes_between_two_times_that_somebody_is_forgotten_nothing_is_kept(store, memory):
    memories = HeldUp(Writer(store))
    memories.forget("Anna")
    memories.write("Anna", memory)
    memories.forget("Anna")
    memories.write("Anna", other_memory(memory, 7.0))
    memories.go.set()
    is_done(memories, "Anna")
    assert number_in(store.read("Anna").memory) == 7.0


def test_who_wants_it_again_and_again_has_one_thread(store, memory):
    memories = HeldUp(Writer(store))
    memories.write("Anna", memory)
    for _ in range(100):
        memories.forget("Anna")
    assert sum(thread.name == "forget memory" for thread in threading.enumerate()) == 1
    memories.go.set()
    is_done(memories, "Anna")
    assert store.people() == []


@pytest.mark.slow
def test_who_wants_it_and_is_gone_at_once_is_forgotten(patched, ttt_repo, tmp_path):
    rows = make_rows(ttt_repo, 2)
    store = MemoryStore(tmp_path / "kept", rows.lm_gen.lm_model)
    hall = Hall(rows, memories=Memories(Writer(store)))
    engine = hall.engine
    for name in ("before the handshake", "as they leave", "as the server ends"):
        person = hall.come(name=name)
        hall.say(person, frames(end=20))
        engine.leave(person)
        while engine.stats()["people"]:
            time.sleep(0.005)
    is_done(engine.memories, "before the handshake", "as they leave", "as the server ends")
    assert len(store.people()) == 3

    person = hall.come(name="as they leave")
    with engine._changed:  # between two ticks
        engine.forget(person)
        engine.leave(person)
    person = Person(GREEDY, "before the handshake")
    assert engine.enter(person)
    engine.forget(person)
    hall.wait(person, Begin)
    person = hall.come(name="as the server ends")
    with engine._changed:
        engine.forget(person)
        engine.end_all(1001, "")
    engine.stop()
    assert store.people() == []
