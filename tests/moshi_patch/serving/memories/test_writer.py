"""The writer of memories: off the tick, the latest of a person wins, and what was forgotten does not come back."""

import logging
import threading
import time

import pytest

from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.store_types import Kept, Lost, StoreError, Unavailable
from moshi_patch.serving.memories.writer import Writer
from tests.support.memory_stores import model_and_memory, number_in, other_memory

pytestmark = pytest.mark.usefixtures("patched")


class Told:
    """What `done` was told, in order."""

    def __init__(self):
        self.all: list = []
        self.came = threading.Semaphore(0)

    def __call__(self, generation, error) -> None:
        assert (generation is None) != (error is None)
        self.all.append(error or generation)
        self.came.release()

    def next(self):
        assert self.came.acquire(timeout=20)
        return self.all[-1]


class Held:
    """A store whose creations wait, one after the other, until they are let go, and fail where it is said."""

    def __init__(self, store: MemoryStore):
        self.begun, self.go, self.error = threading.Semaphore(0), threading.Semaphore(0), None
        create = store.files.create

        def held(*args) -> None:
            self.begun.release()
            assert self.go.acquire(timeout=20)
            if self.error is not None:
                raise self.error
            create(*args)

        store.files.create = held

    def wait(self) -> None:
        assert self.begun.acquire(timeout=20)


@pytest.fixture
def store(tmp_path) -> MemoryStore:
    return MemoryStore(tmp_path / "store", model_and_memory()[0], timeout_s=20)


@pytest.fixture
def memory():
    return model_and_memory()[1]


@pytest.fixture
def writer(store):
    writer = Writer(store, most=2, retry_every_s=0.05, retry_for_s=0.4)
    yield writer
    assert writer.close(5) == []


def test_what_is_submitted_is_written_and_done_is_told_its_generation(store, writer, memory):
    told = Told()
    writer.submit("anna", memory, 0, done=told)
    assert told.next() == 1
    assert writer.drain(5) == []
    assert not writer.pending("anna")
    assert writer.oldest_s() == 0
    assert writer.read("anna").generation == 1
    writer.submit("anna", other_memory(memory, 3), 1, told)
    assert told.next() == 2
    assert number_in(store.read("anna").memory) == 3


def test_the_latest_of_a_person_wins_and_goes_on_from_what_was_written_meanwhile(store, writer, memory):
    held, told = Held(store), Told()
    writer.submit("anna", other_memory(memory, 0), 0, told)
    held.wait()
    for number in range(1, 2000):
        writer.submit("anna", {} if number < 1999 else other_memory(memory, 49), 0, told)
    assert writer.pending("anna")
    assert writer.oldest_s() > 0
    assert told.all == []
    held.go.release()
    held.go.release()
    assert writer.drain(20) == []
    assert told.all == [1] + 1999 * [2]
    assert number_in(store.read("anna").memory) == 49


def test_reading_waits_for_what_the_last_visit_left(store, writer, memory):
    held = Held(store)
    writer.submit("anna", other_memory(memory, 6), 0)
    held.wait()
    with pytest.raises(Unavailable, match=r"the last visit is still not written after 0\.05 s"):
        writer.read("anna", 0.05)
    threading.Timer(0.1, held.go.release).start()
    assert number_in(writer.read("anna", 20).memory) == 6


def test_submitting_takes_no_time_and_bounded_memory_while_the_store_is_silent(store, writer, memory):
    held, told = Held(store), Told()
    began = time.monotonic()
    writer.submit("first", memory, 0, told)
    held.wait()
    for name in ("a", "b", "c"):
        writer.submit(name, memory, 0, told)
    assert time.monotonic() - began < 5
    (refused,) = told.all
    assert isinstance(refused, StoreError)
    assert "not written: 2 memories wait for the store" in str(refused)
    writer.submit("b", other_memory(memory, 2), 0, told)  # who waits already may give a newer one
    assert writer.drain(0.01) == ["first", "a", "b"]
    for _ in range(3):
        held.go.release()
    assert writer.drain(20) == []
    assert [one.name for one in store.people()] == ["a", "b", "first"]


def test_a_store_that_comes_back_gets_what_it_refused(store, writer, memory, caplog):
    caplog.set_level(logging.ERROR)
    held, told = Held(store), Told()
    held.error = OSError(28, "No space left on device")
    writer.submit("anna", other_memory(memory, 1), 0, told)
    held.wait()
    held.go.release()
    held.wait()  # it is tried again
    writer.submit("anna", other_memory(memory, 2), 0, told)
    held.error = None
    for _ in range(2):
        held.go.release()
    assert writer.drain(20) == []
    assert told.all == [1, 2]
    assert number_in(store.read("anna").memory) == 2
    assert "cannot be written: No space left on device." in caplog.text
    assert "anna" not in caplog.text.replace(str(store.name), "")


def test_who_comes_late_to_a_store_that_is_full_for_long_is_tried_again_as_long_as_the_first(store, writer, memory):
    began, full_for, told, create = time.monotonic(), 0.6, Told(), store.files.create

    def full(*args) -> None:
        if time.monotonic() < began + full_for:
            raise OSError(28, "No space left on device")
        create(*args)

    store.files.create = full
    writer.submit("anna", other_memory(memory, 1), 0, told)
    time.sleep(0.35)  # it is tried for 0.4 s
    writer.submit("anna", other_memory(memory, 2), 0, told)
    assert writer.drain(20) == []
    assert told.all[-1] == 1
    assert number_in(store.read("anna").memory) == 2


def test_a_store_that_stays_full_is_told_in_the_end(store, writer, memory):
    told = Told()

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    store.files.create = full
    writer.submit("anna", memory, 0, told)
    error = told.next()
    assert isinstance(error, Unavailable)
    assert str(error).endswith("cannot be written: No space left on device.")
    assert writer.drain(5) == []


def test_whom_another_server_has_is_lost_at_once(store, writer, memory):
    MemoryStore(store.files.root, model_and_memory()[0]).write("anna", memory, 0)
    told = Told()
    writer.submit("anna", other_memory(memory, 3), 0, told)
    assert isinstance(told.next(), Lost)
    assert writer.drain(5) == []
    assert store.read("anna").generation == 1


def test_forgetting_cancels_what_waits_and_what_is_being_written(store, writer, memory):
    told = Told()
    writer.submit("anna", memory, 0, told)
    assert told.next() == 1
    held = Held(store)
    writer.submit("anna", other_memory(memory, 1), 1, told)
    held.wait()
    writer.submit("anna", other_memory(memory, 2), 1, told)
    threading.Timer(0.1, held.go.release).start()
    assert writer.forget("anna") == 1
    assert [type(one) for one in told.all] == [int, Lost, Lost]
    assert not writer.pending("anna")
    assert store.read("anna") == Kept(None, 0)
    assert list(store.files.root.iterdir()) == []
    writer.submit("anna", memory, 2, told)  # by somebody who has not heard of it
    assert writer.drain(20) == []
    assert "generation 2 is gone: it was forgotten" in str(told.all[-1])
    assert store.people() == []
    held.go.release()
    writer.submit("anna", memory, 0, told)
    assert writer.drain(20) == []
    assert told.all[-1] == 1


def test_a_write_whose_success_was_never_heard_of_is_no_loss(store, writer, memory):
    """The store answers too late: what was written is the writer's own, and it goes on from there."""
    told, create, first = Told(), store.files.create, [True]

    def deaf(*args) -> None:
        create(*args)
        if first:
            first.clear()
            raise TimeoutError("the network")

    store.files.create = deaf
    writer.submit("anna", other_memory(memory, 4), 0, told)
    assert told.next() == 2
    assert number_in(store.read("anna").memory) == 4


def test_what_cannot_be_written_at_all_is_told_and_the_thread_lives(store, writer, memory):
    told = Told()
    writer.submit("anna", {"x": "no tensor"}, 0, told)
    assert isinstance(told.next(), StoreError)

    def broken(generation, error) -> None:
        raise RuntimeError("in done")

    writer.submit("anna", memory, 0, broken)
    writer.submit("otto", memory, 0, told)
    assert writer.drain(20) == []
    assert told.all[-1] == 1


def test_a_closed_writer_takes_nothing_and_says_what_is_not_written(store, memory):
    writer, held, told = Writer(store), Held(store), Told()
    writer.submit("anna", memory, 0, told)
    held.wait()
    writer.submit("otto", memory, 0, told)
    assert writer.close(0.01) == ["anna", "otto"]
    writer.submit("emma", memory, 0, told)
    assert [str(error).split("not written: ")[1] for error in told.all] == [
        "the server ended before.",
        "the writer is closed.",
    ]
    held.go.release()
    writer._thread.join(20)
    assert [str(error).split(": ", 1)[1] for error in told.all] == [
        "not written: the server ended before.",
        "not written: the writer is closed.",
        "not written: the server ended before.",
    ]
    assert store.people() == []
