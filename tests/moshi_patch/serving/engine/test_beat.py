"""When the model steps, in a clock that is reckoned: frames come each at their time, and a step takes none."""

import itertools
import random

import pytest

from moshi_patch.serving.engine.beat import GAP_STEPS, MOVE_EVERY_S, NOTHING_DUE_S, Beat
from moshi_patch.serving.engine.person import Person
from moshi_patch.serving.engine.policy import STEP_S, Policy
from moshi_patch.serving.engine.sampler import Sampling

SETTLED_S = MOVE_EVERY_S + 3
"""After that the beat is where it stays, wherever it began."""


class Simulation:
    """People of whom each speaks at a phase of their own, and steps when the beat says so.

    Attributes:
        waits: of each frame: who, when the step began that it was in, and how long it had waited; seconds.
        steps: when each began.
    """

    def __init__(self, people: int, policy: Policy | None = None):
        self.people = [Person(Sampling()) for _ in range(people)]
        self.beat, self.now = Beat(policy or Policy()), 0.0
        self.waits: list[tuple[int, float, float]] = []
        self.steps: list[float] = []

    def run(self, arrivals: list[tuple[float, int]]) -> "Simulation":
        """`arrivals`: when a frame of whom comes."""
        for time, number in sorted(arrivals):
            self._step_until(time)
            self.people[number].frames.append((None, time))
        self.spoken_until = self.now - STEP_S
        self._step_until(self.now + 1)
        return self

    def _step_until(self, time: float) -> None:
        while (due := self.now + self.beat.due_in(self.people, self.now)) <= time:
            self.now = due
            self.steps.append(due)
            came = {person: person.frames.popleft()[1] for person in self.people if person.frames}
            self.beat.begin(self.people, came, due)
            self.waits += [(self.people.index(person), due, due - at) for person, at in came.items()]
        self.now = time

    def longest(self, people, since: float) -> float:
        """Of the waits of these people since then, and until the first one stops to speak."""
        return max(wait for number, at, wait in self.waits if number in people and since <= at < self.spoken_until)


def speech(phases: list[float], seconds: float, late=lambda: 0.0, start: float = 0.0) -> list[tuple[float, int]]:
    """A frame of each in every 80 ms, `late()` seconds late."""
    frames = range(int(seconds / STEP_S))
    return [
        (start + phase + STEP_S * k + late(), number)
        for (number, phase), k in itertools.product(enumerate(phases), frames)
    ]


def shortest_possible(phases: list[float]) -> float:
    """What the one who waits longest waits, if steps begin with the longest pause."""
    at = sorted(phases)
    pauses = [later - earlier for earlier, later in itertools.pairwise([*at, at[0] + STEP_S])]
    return STEP_S - max(pauses)


@pytest.mark.parametrize("people", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("jitter", [0.0, 0.004])
def test_nobody_waits_much_longer_than_in_the_best_of_all_beats(people, jitter):
    draw, policy = random.Random(people), Policy()
    for _ in range(20):
        phases = [draw.uniform(0, STEP_S) for _ in range(people)]
        done = Simulation(people).run(speech(phases, SETTLED_S + 7, lambda: draw.uniform(0, jitter)))
        longest = done.longest(range(people), SETTLED_S)
        assert longest <= min(STEP_S, shortest_possible(phases) + policy.pause_s) + 2 * jitter + 1e-6
        assert len(done.steps) <= (SETTLED_S + 7) / STEP_S + 3  # it moved once, if at all
        assert len(done.waits) == people * int((SETTLED_S + 7) / STEP_S)


def test_two_people_a_moment_apart_are_answered_together_whoever_began():
    for phases in ([0.0, 0.01], [0.01, 0.0], [0.0, 0.07], [0.07, 0.0]):
        done = Simulation(2).run(speech(phases, 30))
        assert done.longest(range(2), SETTLED_S) == pytest.approx(0.01)


def test_the_beat_moves_once_and_only_for_what_lasts():
    done = Simulation(2).run(speech([0.0, 0.01], 30))
    early = [step for last, step in itertools.pairwise(done.steps) if 0 < step - last < STEP_S / 2]
    assert len(early) == 1
    assert GAP_STEPS * STEP_S <= early[0] <= (GAP_STEPS + 3) * STEP_S
    assert done.longest([1], 0) == pytest.approx(0.07)  # before
    assert done.longest(range(2), early[0] + STEP_S) == pytest.approx(0.01)
    draw = random.Random(0)
    restless = Simulation(2).run(speech([0.0, 0.0], 30, lambda: draw.uniform(0, STEP_S)))
    assert len(restless.steps) <= 30 / STEP_S * 1.5
    assert restless.beat._moved == float("-inf")


def test_who_says_nothing_or_has_left_is_not_waited_for():
    silent = Simulation(3)
    silent.run(speech([0.0, 0.07], 2))
    assert silent.longest([0, 1], 0.2) == pytest.approx(0.01)
    first, second = silent.people[0], silent.people[1]
    silent.people.remove(second)
    silent.waits.clear()
    silent.run(speech([0.0], 2, start=4))
    assert silent.longest([0], 0) == pytest.approx(0)
    assert set(silent.beat._expected) == {first}


def test_who_is_mute_for_a_while_is_not_waited_for_for_ever():
    """The last speaker goes mute while the first one's frame has waited for most of a step."""
    everybody = speech([0.0, 0.016, 0.032, 0.048, 0.064], 60)
    done = Simulation(5).run([(at, number) for at, number in everybody if number != 4 or at < 20])
    assert done.longest(range(4), 35) == pytest.approx(0.048)


def test_who_is_a_little_late_is_waited_for_and_who_is_very_late_is_not():
    little, very = Policy().grace_s * 0.9, Policy().grace_s * 1.1
    for late, steps in ((little, 1), (very, 2)):
        start = 2 * GAP_STEPS * STEP_S
        done = Simulation(2).run([*speech([0.0, 0.0], start), (start, 0), (start + late, 1)])
        last = [at for at in done.steps if at > start - STEP_S / 2]
        assert len(last) == steps
        assert last[0] == pytest.approx(start + min(late, Policy().grace_s))


def test_who_comes_in_bursts_costs_the_others_little():
    """Three frames at once, each 240 ms, as some clients send them."""
    draw = random.Random(3)
    for _ in range(20):
        phases = [draw.uniform(0, STEP_S) for _ in range(3)]
        bursts = [(3 * STEP_S * k + 2 * STEP_S, 3) for k in range(80) for _ in range(3)]
        done = Simulation(4).run(speech(phases, 20) + bursts)
        assert done.longest(range(3), 1) <= STEP_S + Policy().grace_s + 1e-6
        assert len(done.steps) <= 1.7 * 20 / STEP_S


def test_nothing_is_due_when_nobody_has_said_anything():
    assert Beat(Policy()).due_in([], 0.0) == NOTHING_DUE_S
    assert Beat(Policy()).due_in([Person(Sampling())], 1e9) == NOTHING_DUE_S
