"""Who wants to be forgotten is, whenever they say it: nothing from before comes back, and what comes after is kept."""

import threading
import time

import pytest

from moshi_patch.serving.engine.person import Begin, End, Person
from moshi_patch.serving.engine.policy import Policy
from moshi_patch.serving.memories.remember import Memories
from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.store_types import Unavailable
from moshi_patch.serving.memories.writer import Writer
from tests.support.hall import Hall
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


class Silent(MemoryStore):
    """A store that does not answer those who want to be forgotten, so many times."""

    times = 0

    def forget(self, person: str) -> int:
        if self.times:
            self.times -= 1
            raise Unavailable("no answer within 30 s")
        return super().forget(person)


@pytest.fixture
def silent_store(patched, tmp_path, memory):
    store = Silent(tmp_path / "memories", model_and_memory()[0])
    store.write("Anna", memory, 0)
    return store


def test_a_store_that_does_not_answer_is_asked_again_until_it_has_forgotten(silent_store, memory):
    silent_store.times = 3
    memories = Memories(Writer(silent_store, retry_every_s=0.01))
    memories.forget("Anna")
    memories.write("Anna", other_memory(memory, 7.0))
    is_done(memories, "Anna")
    assert number_in(silent_store.read("Anna").memory) == 7.0
    assert silent_store.read("Anna").generation == 1


def test_who_asks_again_while_the_store_is_silent_is_forgotten_at_once_when_it_speaks(silent_store):
    silent_store.times = 1
    memories = Memories(Writer(silent_store, retry_every_s=1000.0))
    memories.forget("Anna")
    while silent_store.times:
        time.sleep(0.005)
    memories.forget("Anna")
    is_done(memories, "Anna")
    assert silent_store.people() == []


def test_the_store_is_not_asked_for_ever(silent_store, caplog):
    silent_store.times = 1000
    memories = Memories(Writer(silent_store, retry_every_s=0.001, retry_for_s=0.05))
    memories.forget("Anna")
    is_done(memories, "Anna")
    assert 0 < silent_store.times < 1000
    assert "A memory may not be forgotten: no answer within 30 s" in caplog.text


@pytest.mark.slow
def test_who_wants_it_while_they_wait_and_gets_no_row_is_forgotten(patched, ttt_repo, tmp_path):
    rows = make_rows(ttt_repo, 1)
    store = MemoryStore(tmp_path / "kept", rows.lm_gen.lm_model)
    hall = Hall(rows, Policy(name_s=0.05), memories=Memories(Writer(store)))
    engine = hall.engine

    def talked_and_gone(name):
        person = hall.come(name=name)
        hall.say(person, frames(end=4))
        hall.leave(person)
        is_done(engine.memories, name)

    def kept():
        return {person.name for person in store.people()}

    everybody = {"leaves", "talks in another window", "is sent away", "a guest"}
    for name in everybody:
        talked_and_gone(name)
    assert kept() == everybody

    first = hall.come(name="talks in another window")
    waiting = hall.enter(name="leaves")
    engine.forget(waiting)
    engine.leave(waiting)
    is_done(engine.memories, "leaves")
    assert kept() == everybody - {"leaves"}

    hall.say(first, frames(end=4))
    twice = hall.enter(name="talks in another window")
    engine.forget(twice)
    hall.wait(twice, End)
    while first.forget:
        time.sleep(0.005)
    hall.leave(first)
    is_done(engine.memories, "talks in another window")
    assert kept() == everybody - {"leaves", "talks in another window"}

    first = hall.come(name="a guest")
    guest = hall.enter(name="a guest", guest=True)
    with engine._changed:  # while they still wait for the name
        engine.forget(guest)
        engine.leave(guest)
    assert not first.forget

    waiting = hall.enter(name="is sent away")
    engine.forget(waiting)
    engine.drain()
    hall.wait(waiting, End)
    engine.stop()
    assert kept() == {"a guest"}
