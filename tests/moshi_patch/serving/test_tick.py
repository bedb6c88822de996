"""The model's thread without sockets: who is heard when, whatever others do, and what happens when it is slow."""

import random
import threading
import time

import numpy as np
import pytest
import torch

import moshi_patch
from moshi_patch.serving.person import Begin, End, Pace, Person, Place, Stage
from moshi_patch.serving.policy import FRAME, RATE, STEP_S, Policy
from moshi_patch.serving.rows import Answer
from moshi_patch.serving.sampler import Sampling
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


class Steps:
    """Rows whose steps take as long as they are told, and which note who was heard when."""

    def __init__(self, rows, seconds=0.0):
        self.rows, self.seconds, self.noted = rows, seconds, []
        rows_step = rows.step

        def step(frames):
            began = time.monotonic()
            answers = rows_step(frames)
            time.sleep(max(0.0, began + self.seconds - time.monotonic()))
            self.noted.append((began, {row: frame[0] for row, frame in frames.items()}))
            return answers

        rows.step = step


@pytest.fixture(scope="module")
def slow_hall(patched_module, ttt_repo):
    rows = make_rows(ttt_repo, 2)
    steps = Steps(rows)
    hall = Hall(rows)
    yield hall, steps
    hall.engine.stop()


def numbered(count: int) -> list[np.ndarray]:
    """Frames that tell which they are."""
    return [np.full(FRAME, number / 1000, np.float32) for number in range(1, count + 1)]


@slow
def test_of_speech_that_a_slow_model_cannot_follow_the_oldest_is_dropped_and_counted(slow_hall):
    hall, steps = slow_hall
    person = hall.come()
    steps.noted.clear()
    steps.seconds, before, late = 0.2, hall.engine.dropped_frames, hall.engine.late_frames
    for frame in numbered(40):
        assert hall.engine.hear(person, [frame], ahead=False)
        assert len(person.frames) <= 6
        time.sleep(0.02)
    while person.frames:
        time.sleep(0.01)
    steps.seconds = 0.0
    hall.leave(person)
    heard = [round(1000 * next(iter(frames.values()))) for _, frames in steps.noted]
    assert heard == sorted(heard)
    assert heard[-6:] == list(range(35, 41))  # the newest are all heard
    assert person.dropped == 40 - len(heard) == hall.engine.dropped_frames - before > 10
    assert hall.engine.late_frames - late >= 5


@slow
def test_nothing_of_a_file_is_dropped_however_slow_the_model_is(slow_hall):
    hall, steps = slow_hall
    person = hall.come()
    steps.noted.clear()
    steps.seconds, before = 0.05, hall.engine.dropped_frames
    assert not hall.engine.hear(person, numbered(20), ahead=True)  # no room for more
    hall.wait(person, Answer, 15)
    assert hall.engine.hear(person, [], ahead=True)
    hall.wait(person, Answer, 20)
    steps.seconds = 0.0
    hall.leave(person)
    assert [round(1000 * next(iter(frames.values()))) for _, frames in steps.noted] == list(range(1, 21))
    assert hall.engine.dropped_frames == before


@slow
def test_a_step_waits_for_everybody_but_no_longer_than_a_step(slow_hall):
    hall, steps = slow_hall
    one, other = hall.come(), hall.come()
    hall.engine.hear(one, numbered(1), ahead=False)
    hall.wait(one, Answer, 1)
    steps.noted.clear()
    began = time.monotonic()
    hall.engine.hear(one, numbered(1), ahead=False)
    hall.wait(one, Answer, 2)
    assert time.monotonic() - began > 0.03  # it waited for the other one, who said nothing
    steps.noted.clear()
    hall.engine.hear(one, numbered(1), ahead=False)
    hall.engine.hear(other, numbered(1), ahead=False)
    hall.wait(one, Answer, 3)
    assert [sorted(frames) for _, frames in steps.noted] == [[0, 1]]  # both in one step
    for person in (one, other):
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


def test_speech_is_in_time_and_a_file_or_a_flood_is_not_wherever_the_clock_stands():
    for start in (0.0, 1e9):
        speech, now = Pace(3 * STEP_S), start
        for _ in range(1000):
            now += STEP_S
            assert not speech.hear(FRAME, now)
        now += 60.0  # silence gives no credit for later
        assert not speech.hear(FRAME, now)
        assert speech.hear(12 * FRAME, now)
        now += 2.0
        assert not speech.hear(FRAME, now)
        assert speech.hear(RATE, now - 100.0)  # a clock that went back


def test_a_flood_is_told_from_speech_also_where_the_model_is_slow():
    """As the time in which it is not read does not count."""
    pace, now = Pace(3 * STEP_S), 0.0
    ahead = []
    for _ in range(100):
        ahead.append(pace.hear(FRAME, now))
        now += 0.2  # the model takes longer than a step
        pace.resume(now)
    assert ahead == [False] * 3 + [True] * 97
