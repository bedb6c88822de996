"""The model's thread without sockets: who is heard when, whatever others do, and what happens when it is slow."""

import random
import threading
import time

import pytest
import torch

import moshi_patch
from moshi_patch.serving.engine.person import Begin, End, Person, Place, Stage
from moshi_patch.serving.engine.policy import Policy
from moshi_patch.serving.engine.rows import Answer
from moshi_patch.serving.engine.sampler import Sampling
from tests.support.hall import Hall
from tests.support.rows import GREEDY, assert_same, frames, make_rows

slow = pytest.mark.slow
SAMPLED = Sampling(seed=7, temperature=0.9)


@pytest.fixture(scope="module")
def hall(patched_module, ttt_repo):
    hall = Hall(make_rows(ttt_repo, 4), Policy(joins=1))
    yield hall
    hall.engine.stop()


@pytest.fixture(scope="module")
def alone(hall):
    """What a person hears when nobody else is there, by how they draw."""
    heard = {}
    for sampling in (GREEDY, SAMPLED):
        person = hall.come(sampling)
        heard[sampling] = hall.say(person, frames(end=30))
        hall.leave(person)
    return heard


def come_and_go(hall, rng):
    person = hall.come(Sampling(seed=rng.randrange(99)))
    hall.say(person, frames("sister", end=rng.randrange(1, 9)))
    hall.leave(person)


def flood(hall, rng):
    person = hall.come(Sampling(seed=1))
    hall.engine.hear(person, frames("train", end=40), ahead=True)
    hall.wait(person, Answer, 30)
    hall.leave(person)


def stall(hall, rng):
    person = hall.come()
    hall.say(person, frames("train", end=3))
    time.sleep(0.3)
    hall.say(person, frames("train", end=2))
    hall.leave(person)


def diverge(hall, rng):
    person = hall.come()
    hall.say(person, frames("train", end=4))
    gating = next(iter(moshi_patch.ttt_gatings(hall.engine.rows.lm_gen.lm_model).values()))
    gating._streaming_state.fast.delta[person.row] = torch.nan
    hall.engine.hear(person, frames("sister", end=4), ahead=True)
    assert hall.wait(person, End)[0] == End(1011, "the model's numbers are not finite any more")
    assert len(hall.of(person, Answer)) < 8


def change_seed(hall, rng):
    person = hall.come(Sampling(seed=rng.randrange(99), temperature=3.0, top_k=3))
    hall.say(person, frames("boat", end=12), pause=0.02)
    hall.leave(person)


@slow
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("other", [come_and_go, flood, stall, diverge, change_seed], ids=lambda f: f.__name__)
def test_what_a_person_hears_is_bitwise_the_same_whatever_the_others_do(hall, alone, sampling, other):
    rng, ended = random.Random(0), []

    def misbehave():
        other(hall, rng)
        ended.append(other)

    before = hall.come() if other is change_seed else None  # so that the person has another row
    person = hall.come(sampling)
    threads = [threading.Thread(target=misbehave) for _ in range(2)]
    for thread in threads:
        thread.start()
    heard = hall.say(person, frames(end=30))
    for thread in threads:
        thread.join()
    for one in (person, before):
        if one:
            hall.leave(one)
    assert_same(heard, alone[sampling])
    assert len(ended) == 2
    assert len(hall.engine.rows.free) == 4


@slow
def test_the_order_in_which_people_come_and_speak_changes_nothing(hall, alone):
    def all_at_once(samplings):
        people = [hall.come(sampling) for sampling in samplings]
        threads = [threading.Thread(target=hall.say, args=(person, frames(end=30))) for person in reversed(people)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for person in people:
            hall.leave(person)
        return {person.sampling: hall.of(person, Answer) for person in people}

    for order in ([GREEDY, SAMPLED, Sampling(seed=3)], [Sampling(seed=3), SAMPLED, GREEDY]):
        heard = all_at_once(order)
        for sampling in (GREEDY, SAMPLED):
            assert_same(heard[sampling], alone[sampling])


@slow
def test_the_next_person_in_a_row_that_was_not_finite_is_well(hall, alone):
    for _ in range(4):
        diverge(hall, None)
    people = [hall.come() for _ in range(4)]
    for person in people:
        assert_same(hall.say(person, frames(end=12)), alone[GREEDY][:12])
        hall.leave(person)


@slow
def test_a_tick_lets_in_no_more_than_a_few_and_who_waits_is_told_a_place(hall):
    people = [hall.enter() for _ in range(6)]
    for person in people[:4]:
        hall.wait(person, Begin)
    assert [hall.wait(person, Place)[-1] for person in people[4:]] == [Place(1), Place(2)]
    hall.leave(people[0])
    hall.wait(people[4], Begin)
    assert hall.wait(people[5], Place, 2)[-1] == Place(1)
    for person in people[1:]:
        hall.engine.leave(person)
    while len(hall.engine.rows.free) < 4:
        time.sleep(0.001)
    assert hall.of(people[5], Begin) == [] or people[5].stage is Stage.GONE
    assert hall.engine.stats()["queue"] == 0


@slow
def test_masks_have_changed_twice_before_anybody_comes(patched_module, ttt_repo):
    """Moshi captures a graph of the second change, while no other thread may use the device."""
    rows = make_rows(ttt_repo, 2)
    changes = {rows.mimi: 0, rows.lm_gen: 0}

    def counted(model):
        set_exec_mask = model.set_exec_mask

        def count(mask):
            changes[model] += 1
            set_exec_mask(mask)

        return count

    for model in changes:
        model.set_exec_mask = counted(model)
    Hall(rows).engine.stop()
    assert min(changes.values()) >= 2


@slow
def test_who_leaves_twice_or_speaks_after_the_end_does_no_harm(hall):
    person = hall.come()
    for _ in range(3):
        hall.engine.leave(person)
    hall.leave(person)
    assert hall.engine.hear(person, frames(end=3), ahead=True)
    assert not person.frames
    hall.engine.forget(person)
    hall.engine.set_updates(person, False)
    assert len(hall.engine.rows.free) == 4


@slow
def test_when_the_model_fails_everybody_is_told_and_nobody_is_let_in(patched_module, ttt_repo, caplog):
    rows = make_rows(ttt_repo, 2)
    hall = Hall(rows, Policy(queue=1))
    people = [hall.come(), hall.come()]
    waiting = hall.enter()

    def step(frames):
        raise RuntimeError("CUDA error: device lost")

    rows.step = step
    hall.engine.hear(people[0], frames(end=2), ahead=True)
    for person in people:
        assert hall.wait(person, End)[0] == End(1011, "error in the server")
    assert hall.wait(waiting, End)[0] == End(1013, "the model cannot go on")
    assert not hall.engine.enter(Person(GREEDY))
    assert hall.engine.stats()["failure"] == "RuntimeError in the model"
    hall.engine.stop()
    assert "device lost" in caplog.text
