"""The rule for broken items: a few are skipped by name; more than 5 % of a data set stop the run."""

from ..common.errors import UserError

MAX_BROKEN_SHARE = 0.05
"""A larger share of broken items stops the run."""


class BrokenItem(ValueError):
    """One item that cannot be used; the message says what is wrong with it."""


class BrokenData(UserError, ValueError):
    """Too much of a data set is broken to go on, or not all ranks have the same."""


def is_too_many(broken: int, total: int) -> bool:
    """Whether so many broken items of `total` stop the run."""
    return broken > MAX_BROKEN_SHARE * total


class BrokenCount:
    """Counts the broken items of one data set.

    Args:
        name: of the data set in messages, such as `paper.longform`.
        unit: what is counted, in the plural: items, files, pairs.
        total: how many items the data set has, broken ones included.
        hint: how to find out more; the end of the sentence that says that there are too many.

    Attributes:
        number: of broken items so far.
        last: what is wrong with the last one; "" when it is not known.
    """

    def __init__(self, name: str, unit: str, total: int, hint: str = ""):
        self._name, self._unit, self._total, self._hint = name, unit, total, hint
        self.number, self.last = 0, ""

    def add(self, reason: str, number: int = 1) -> None:
        """Counts `number` items that are broken for the same reason."""
        self.number += number
        self.last = reason

    def verdict(self) -> str | None:
        """In words that they are too many; None when they are not."""
        if not is_too_many(self.number, self._total):
            return None
        return f"{self.number} of {self._total} {self._unit} are broken, more than {MAX_BROKEN_SHARE:.0%}"

    def refuse(self, verdict: str | None = None) -> None:
        """Raises BrokenData when there is a verdict: the one given, or else one's own."""
        verdict = verdict or self.verdict()
        if verdict is not None:
            last = f" The last: {self.last}" if self.last else ""
            raise BrokenData(f"{self._name}: {verdict}{self._hint}.{last}")
