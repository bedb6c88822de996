"""When the model's thread steps: with everybody, without who is missing, and what it drops when it is slow."""

import dataclasses
import time

import numpy as np
import pytest

from moshi_patch.serving.engine.person import Pace
from moshi_patch.serving.engine.policy import FRAME, RATE, STEP_S
from moshi_patch.serving.engine.rows import Answer
from tests.support.hall import Hall
from tests.support.rows import make_rows

slow = pytest.mark.slow


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
def test_a_step_waits_for_who_spoke_in_the_last_one_and_for_nobody_else(slow_hall):
    hall, steps = slow_hall
    one, other, policy = hall.come(), hall.come(), hall.engine.policy
    hall.engine._beat.policy = dataclasses.replace(policy, grace_s=1.0)
    hall.engine.hear(one, numbered(1), ahead=False)
    hall.wait(one, Answer, 1)
    hall.engine.hear(one, numbered(1), ahead=False)
    hall.wait(one, Answer, 2)  # the other one has not spoken yet
    hall.engine.hear(other, numbered(1), ahead=False)
    time.sleep(0.2)  # more than a step
    steps.noted.clear()
    hall.engine.hear(one, numbered(1), ahead=False)
    hall.wait(one, Answer, 3)
    assert [sorted(frames) for _, frames in steps.noted] == [[0, 1]]  # both in one step
    hall.engine.hear(one, numbered(1), ahead=False)
    time.sleep(0.2)
    assert len(steps.noted) == 1
    hall.engine.hear(other, numbered(1), ahead=False)
    hall.wait(one, Answer, 4)
    assert [sorted(frames) for _, frames in steps.noted] == [[0, 1], [0, 1]]
    hall.engine._beat.policy = policy
    hall.engine.hear(one, numbered(1), ahead=False)
    hall.wait(one, Answer, 5)  # the other one says nothing any more, and is not waited for again
    hall.engine._beat.policy = dataclasses.replace(policy, grace_s=60.0)
    hall.engine.hear(one, numbered(1), ahead=False)
    hall.wait(one, Answer, 6)
    hall.engine._beat.policy = policy
    for person in (one, other):
        hall.leave(person)


@slow
def test_only_a_frame_that_changes_when_a_step_is_due_wakes_the_models_thread(slow_hall, monkeypatch):
    hall, _ = slow_hall
    one, other = hall.come(), hall.come()
    for person in (one, other, one, other):
        hall.engine.hear(person, numbered(1), ahead=False)
    hall.wait(one, Answer, 2)
    hall.wait(other, Answer, 2)
    woken, wake = [], hall.engine._changed.notify_all
    monkeypatch.setattr(hall.engine._changed, "notify_all", lambda: woken.append(True) or wake())
    monkeypatch.setattr(hall.engine._beat, "policy", dataclasses.replace(hall.engine.policy, grace_s=10.0))
    hall.engine._beat._expected = dict.fromkeys((one, other), time.monotonic())
    hall.engine.hear(one, [], ahead=False)
    assert woken == []  # half a frame
    hall.engine.hear(one, numbered(1), ahead=False)
    assert len(woken) == 1  # a step is due at some time
    hall.engine.hear(other, numbered(1), ahead=False)
    assert len(woken) >= 2  # now
    hall.wait(one, Answer, 3)
    for person in (one, other):
        hall.leave(person)


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
