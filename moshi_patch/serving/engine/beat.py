"""When the model steps: one step for all in 80 ms, at the moment that keeps those who speak waiting least."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from .person import Person
from .policy import STEP_S, Policy

NOTHING_DUE_S = 60.0

GAP_STEPS = 12
"""So many steps in a row must have shown the same before the beat moves: frames do not come to the millisecond."""

MOVE_EVERY_S = 10.0
"""Between two moves of the beat: at each, some are answered up to a step later than they are used to, once."""


class Beat:
    """For whom the next step waits.

    Everybody's frames come every 80 ms, each at a time of their own. A step goes when all who are expected have one,
    and whoever speaks just after it waits for the next: nearly 80 ms, each time. So the best moment is the beginning of
    the longest pause between two people's frames. To get there, one step does not wait for those who come after it.

    Attributes:
        last: when the last step began.
    """

    def __init__(self, policy: Policy):
        self.policy, self.last = policy, float("-inf")
        self._expected: dict[Person, float] = {}  # when the last step began that each was in
        self._seen, self._moved = 0, float("-inf")

    def due_in(self, talking: Sequence[Person], now: float) -> float:
        """Seconds until a step is due; 0: now.

        That is when everybody has a frame who is expected, as they spoke in the last one, or somebody more than one; or
        else a step's length and a little more after it.
        """
        waiting = [len(person.frames) for person in talking]
        if not any(waiting):
            return NOTHING_DUE_S
        if max(waiting) > 1 or all(person.frames for person in talking if person in self._expected):
            return 0.0
        return max(0.0, self.last + STEP_S + self.policy.grace_s - now)

    def begin(self, talking: Sequence[Person], came: Mapping[Person, float | None], now: float) -> None:
        """A step begins.

        Args:
            talking: all who may speak.
            came: when the frames came that are in it; None: ahead of their time.
        """
        latest = now - STEP_S - self.policy.grace_s  # a step may go before somebody, as another catches up: once
        awaited = {person: at for person, at in self._expected.items() if person in talking and at > latest}
        self.last, self._expected = now, awaited | dict.fromkeys(came, now)
        early = self._before_a_longer_pause(came, now)
        self._seen = self._seen + 1 if early else 0
        if self._seen >= GAP_STEPS and now >= self._moved + MOVE_EVERY_S:
            self._expected, self._seen, self._moved = dict.fromkeys(early, now), 0, now

    def _before_a_longer_pause(self, came: Mapping[Person, float | None], now: float) -> list[Person]:
        """Those whose frames come before a pause that is longer than the one that begins now; nobody, if it is not."""
        if len(came) < 2 or None in came.values() or any(person.frames for person in came):
            return []
        newest_first = sorted(came, key=came.__getitem__, reverse=True)
        ages = [now - came[person] for person in newest_first]
        pauses = [older - newer for newer, older in pairwise(ages)]
        longest = max(pauses)
        if longest < STEP_S - ages[-1] + self.policy.pause_s:
            return []
        return newest_first[pauses.index(longest) + 1 :]
