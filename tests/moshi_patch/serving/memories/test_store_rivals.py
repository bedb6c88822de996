"""Two who write one person's memory, or one who writes and one who forgets it: one is told that it has lost."""

import os
import threading

import pytest

import moshi_patch
from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.store_types import Lost
from tests.support.memory_stores import model_and_memory, number_in, other_memory

pytestmark = pytest.mark.usefixtures("patched")


def test_a_write_after_somebody_elses_is_lost_and_changes_nothing(url):
    model, memory = model_and_memory()
    mine, theirs = MemoryStore(url, model), MemoryStore(url, model)
    assert mine.write("anna", memory, 0) == 1
    assert theirs.read("anna").generation == 1
    assert theirs.write("anna", other_memory(memory, 7), 1) == 2
    for generation in (0, 1):
        with pytest.raises(Lost, match="somebody else has written generation 2 of this person's memory"):
            mine.write("anna", memory, generation)
    assert number_in(mine.read("anna").memory) == 7


def test_a_server_that_is_far_behind_is_lost_although_its_next_name_is_free_again(url):
    model, memory = model_and_memory()
    behind, ahead = MemoryStore(url, model), MemoryStore(url, model)
    behind.write("anna", memory, 0)
    for generation in range(1, 6):
        ahead.write("anna", memory, generation)
    with pytest.raises(Lost):
        behind.write("anna", memory, 1)
    assert ahead.people()[0].generations == (5, 6)


def test_a_write_that_was_overtaken_while_it_was_under_way_takes_itself_back(url):
    """The name that it creates was used, and is free again."""
    model, memory = model_and_memory()
    behind, ahead = MemoryStore(url, model), MemoryStore(url, model)
    behind.write("anna", memory, 0)
    create = behind.files.create

    def late(*args) -> None:
        for generation in range(1, 6):
            ahead.write("anna", memory, generation)
        create(*args[:-1], lambda: None)

    behind.files.create = late
    with pytest.raises(Lost, match="generation 6"):
        behind.write("anna", memory, 1)
    assert ahead.people()[0].generations == (5, 6)


def test_an_upload_that_arrived_and_was_sent_again_is_no_loss(url):
    model, memory = model_and_memory()
    store = MemoryStore(url, model)
    create = store.files.create

    def twice(*args) -> None:
        create(*args)
        raise FileExistsError("412 Precondition Failed")

    store.files.create = twice
    assert store.write("anna", memory, 0) == 1
    assert store.write("anna", other_memory(memory, 1), 1) == 2
    assert number_in(store.read("anna").memory) == 1
    with pytest.raises(Lost):
        MemoryStore(url, model).write("anna", memory, 1)


def test_after_forgetting_a_write_that_goes_on_from_before_is_lost(url):
    model, memory = model_and_memory()
    mine, other = MemoryStore(url, model), MemoryStore(url, model)
    mine.write("anna", memory, 0)
    assert other.forget("anna") == 1
    with pytest.raises(Lost, match="generation 1 is gone: it was forgotten"):
        mine.write("anna", memory, 1)
    assert other.people() == []
    assert other.write("anna", other_memory(memory, 5), 0) == 1  # somebody begins anew
    with pytest.raises(Lost, match="it was forgotten, and somebody else began anew"):
        mine.write("anna", memory, 1)
    assert number_in(mine.read("anna").memory) == 5
    assert mine.write("anna", memory, 1) == 2


def test_forgetting_meets_a_write_under_way_and_nothing_is_left(url):
    model, memory = model_and_memory()
    mine, other = MemoryStore(url, model), MemoryStore(url, model)
    mine.write("anna", memory, 0)
    create = mine.files.create
    mine.files.create = lambda *args: (other.forget("anna"), create(*args[:-1], lambda: None))
    with pytest.raises(Lost, match="forgotten"):
        mine.write("anna", memory, 1)
    assert mine.files.list() == []


def test_forgetting_meets_the_first_write_of_a_person_and_it_does_not_come_back(tmp_path):
    model, memory = model_and_memory()
    mine, other = MemoryStore(tmp_path, model), MemoryStore(tmp_path, model)
    create = mine.files.create
    mine.files.create = lambda *args: create(*args[:-1], lambda: other.forget("anna"))
    with pytest.raises(Lost, match="it was forgotten while it was written"):
        mine.write("anna", memory, 0)
    assert os.listdir(tmp_path) == []


def test_of_many_racing_threads_one_writes_each_generation(url):
    model, memory = model_and_memory()
    known = moshi_patch.fingerprint(model)
    stores = [MemoryStore(url, model, known=known) for _ in range(4)]
    won: list[list[int]] = [[] for _ in stores]
    gate = threading.Barrier(len(stores))

    def race(number: int) -> None:
        for generation in range(6):
            gate.wait()
            try:
                assert stores[number].write("anna", other_memory(memory, number), generation) == generation + 1
                won[number].append(generation + 1)
            except Lost:
                pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(generation for ones in won for generation in ones) == [1, 2, 3, 4, 5, 6]
    assert 6 in won[number_in(stores[0].read("anna").memory)]
