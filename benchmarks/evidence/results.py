"""Finds all seeds of a cell's runs in the results, and writes their mean and spread."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from .grid import Cell, ordered_runs
from .settings import Settings
from .store import DONE

Line = dict[str, Any]


def _key(settings: dict[str, Any]) -> str:
    return json.dumps(settings | {"seed": 0}, sort_keys=True)


@dataclass
class Results:
    """The runs of a store, together with the grid that asked for them.

    Args:
        cells: of the grid.
        lines: id to line.
    """

    cells: list[Cell]
    lines: dict[str, Line]
    _by_settings: dict[str, list[Line]] = field(init=False)

    def __post_init__(self):
        self._by_settings = {}
        for line in self.lines.values():
            self._by_settings.setdefault(_key(line["settings"]), []).append(line)

    def cell_settings(self, name: str) -> list[Settings]:
        """One `Settings` per combination of the cell, with its first seed.

        Raises:
            KeyError: when the grid has no such cell.
        """
        for cell in self.cells:
            if cell.name == name:
                return [run.settings for run in cell.runs(cell.seeds[0])]
        raise KeyError(name)

    def cell_names(self) -> list[str]:
        """The names of all cells, in the order of the grid."""
        return [cell.name for cell in self.cells]

    def has(self, name: str) -> bool:
        """Whether the grid has that cell."""
        return any(cell.name == name for cell in self.cells)

    def find(self, cell: str, **chosen: Any) -> list[Line]:
        """Finished runs (`ok`) of a cell, all seeds in ascending order, whose settings have the `chosen` values."""
        if not self.has(cell):
            return []
        wanted = [
            settings
            for settings in self.cell_settings(cell)
            if all(getattr(settings, name) == value for name, value in chosen.items())
        ]
        return [line for settings in wanted for line in self.same(settings)]

    def same(self, settings: Settings) -> list[Line]:
        """Finished runs (`ok`) with these settings, all seeds in ascending order."""
        lines = [line for line in self._by_settings.get(_key(settings.as_dict()), []) if line["status"] == "ok"]
        return sorted(lines, key=lambda line: line["settings"]["seed"])

    def not_ok(self) -> list[Line]:
        """Runs that diverged or failed."""
        return [line for line in self.lines.values() if line["status"] != "ok"]

    def missing(self) -> dict[str, int]:
        """By cell, how many of its runs the results do not hold."""
        counts: dict[str, int] = {}
        for run in ordered_runs(self.cells):
            line = self.lines.get(run.settings.id)
            if line is None or line["status"] not in DONE:
                counts[run.cell] = counts.get(run.cell, 0) + 1
        return counts


def nats(condition: str, mark: str = "beyond", variation: str = "", kind: str = "nats") -> Callable[[Line], float]:
    """Reads one number of a line's `final`; raises KeyError where there is none."""
    return lambda line: line["final"][condition][variation][mark][kind]


def values(lines: Iterable[Line], read: Callable[[Line], float]) -> list[float]:
    """What `read` finds in each line; lines that do not have it are left out."""
    found = []
    for line in lines:
        try:
            found.append(read(line))
        except (KeyError, IndexError):
            continue
    return found


def mean(numbers: list[float]) -> float:
    """The mean; not a number for none."""
    return sum(numbers) / len(numbers) if numbers else float("nan")


def plain(numbers: list[float], digits: int = 2) -> str:
    """`mean (lowest–highest)`; one number alone for a single seed, a dash for none."""
    if not numbers:
        return "–"
    text = f"{mean(numbers):.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ({min(numbers):.{digits}f}–{max(numbers):.{digits}f})"


def spread(numbers: list[float], digits: int = 2, percent: bool = False) -> str:
    """As `plain`, in words where there is one seed alone."""
    text = plain([100 * number for number in numbers] if percent else numbers, digits)
    return f"{text} (one seed)" if len(numbers) == 1 else text
