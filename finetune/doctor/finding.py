"""What a check found, as a line and as JSON."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..common.files import finite_or_none

OK, WARNING, FAILED = "ok", "warning", "FAILED"


@dataclass(frozen=True)
class Finding:
    """One finding.

    Args:
        name: what was looked at.
        status: `OK`, `WARNING` or `FAILED`.
        value: what was found.
        remedy: what to do about it; empty when there is nothing to do.
        details: the same in numbers, for JSON.
    """

    name: str
    status: str
    value: str
    remedy: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        remedy = f" -> {self.remedy}" if self.remedy else ""
        return " ".join(f"{self.status} {self.name}: {self.value}{remedy}".split())  # errors of libraries have many

    def to_dict(self) -> dict[str, Any]:
        """As strict JSON can hold it: a number that is not finite is None."""
        return finite_or_none(asdict(self))


def guarded(name: str, checks: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """All of `checks`; an error that nobody foresaw becomes a failed check, so that the others still run."""
    try:
        yield from checks()
    except Exception as error:
        yield Finding(name, FAILED, f"{type(error).__name__}: {error}", "an error that this check did not foresee")


def in_units(size: float) -> str:
    """`1,234 bytes (0.0 MiB)`, or GiB for what is larger."""
    unit, factor = ("GiB", 2**30) if size >= 2**30 else ("MiB", 2**20)
    return f"{size:,.0f} bytes ({size / factor:.2f} {unit})"
