"""Two servers and one person, and servers that are killed: what is read is always something that was written whole.

`KILLS=50 pytest tests/moshi_patch/serving/memories/test_killed_writers.py -s` tries 50 moments and says what was lost.
"""

import contextlib
import os
import random
import select
import signal
import statistics
import time

import pytest
import torch

import moshi_patch
from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.store_types import Kept, Lost
from tests.support.memory_stores import key_file, model_and_memory, number_in, other_memory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]

KILLS = int(os.environ.get("KILLS", "4"))
NUMBERS = 1000


def fork(work) -> tuple[int, int]:
    """A process that does `work(say)`, and the end of a pipe where the numbers arrive that it says."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with contextlib.suppress(BaseException):
            work(lambda number: os.write(writing, number.to_bytes(4, "big")))
            os._exit(0)
        os._exit(1)
    os.close(writing)
    return child, reading


def heard(reading: int) -> list[int]:
    """All that was said until the process ended."""
    with open(reading, "rb") as pipe:
        content = pipe.read()
    return [int.from_bytes(content[at : at + 4], "big") for at in range(0, len(content) - 3, 4)]


def larger(memory: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """A memory whose writing takes long enough to be hit in the middle."""
    return {key: t.repeat(1, times, *[1] * (t.dim() - 2)) if t.dim() > 2 else t for key, t in memory.items()}


def test_two_processes_that_race_for_one_person_never_both_write_a_generation(tmp_path):
    model, memory = model_and_memory()
    known = moshi_patch.fingerprint(model)
    begin = time.monotonic() + 0.3

    def race(mine: int):
        store = MemoryStore(tmp_path, model, known=known)

        def work(say) -> None:
            time.sleep(max(0.0, begin - time.monotonic()))
            for generation in range(30):
                with contextlib.suppress(Lost):
                    say(store.write("anna", other_memory(memory, 100 * generation + mine), generation))

        return work

    children = [fork(race(mine)) for mine in (1, 2)]
    won = [heard(reading) for _, reading in children]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children] == [0, 0]
    assert not set(won[0]) & set(won[1])
    assert sorted([*won[0], *won[1]]) == list(range(1, 31))
    last = number_in(MemoryStore(tmp_path, model, known=known).read("anna").memory)
    assert 30 in won[last % 100 - 1]


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
def test_a_writer_that_is_killed_at_any_moment_loses_what_it_had_not_written_and_no_more(tmp_path, sealed):
    """And never leaves what can be read and is wrong."""
    model, memory = model_and_memory()
    known, key = moshi_patch.fingerprint(model), key_file(tmp_path) if sealed else None
    memories = [larger(other_memory(memory, number), 300) for number in range(8)]

    def open_store() -> MemoryStore:
        return MemoryStore(tmp_path / "store", None, key, known=known)

    def write(say) -> None:
        store = open_store()
        generation = store.read("anna").generation
        say(generation)
        while True:
            generation = store.write("anna", memories[(generation + 1) % 8], generation)
            say(generation)

    generator, lost, partials = random.Random(0), [], 0
    for _ in range(KILLS):
        child, reading = fork(write)
        assert select.select([reading], [], [], 20)[0]
        time.sleep(generator.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said = heard(reading)[-1]
        kept = open_store().read("anna")
        assert kept.generation in (
            said,
            said + 1,
        )  # the one after: whole, but its writer was killed before it could say so
        if kept == Kept(None, 0):
            continue
        assert number_in(kept.memory) == kept.generation % 8
        lost.append(kept.generation - said)
        unfinished = len(list((tmp_path / "store" / "anna").glob(".*")))
        assert unfinished <= 1  # the next writer removes it
        partials += unfinished
    assert kept.generation > 0
    size = open_store().people()[0].size / 2**20
    open_store().forget("anna")
    assert list((tmp_path / "store").iterdir()) == []
    print(
        f"{KILLS} kills, {size:.1f} MiB a write, {kept.generation} generations: nothing that was told as written was "
        f"lost; {statistics.mean(lost or [0]):.0%} had one more; after {partials} there was an unfinished file"
    )
