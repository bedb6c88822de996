"""The registry of the pages' generated parts, and what their tables share."""

from collections.abc import Callable
from functools import partial
from typing import Any

from finetune.common.tables import markdown

from ..results import Line, Results, nats, spread, values

BLOCKS: dict[str, Callable[[Results], str]] = {}


def block(function: Callable[[Results], str]) -> Callable[[Results], str]:
    """Register a function under its own name, which is also that of its markers."""
    BLOCKS[function.__name__] = function
    return function


table = partial(markdown, numbers_right=True)
"""A Markdown table from its heading and its rows; all columns but the first stand on the right."""


def three_marks(name: str, lines: list[Line], condition: str, marks: tuple[str, ...]) -> list[str]:
    """A row: its name, the spread of each mark under one condition, and how many seeds there are."""
    return [name, *(spread(values(lines, nats(condition, mark))) for mark in marks), str(len(lines))]


def gap_table(found: dict[str, tuple[list[Line], str]]) -> str:
    """The loss beyond the window by the gap, for each name its runs and the condition."""
    windows = (1, 2, 4, 8, 12, 16)
    rows = [
        [name, *(spread(values(lines, nats(condition, variation=f"gap {w}"))) for w in windows), str(len(lines))]
        for name, (lines, condition) in found.items()
    ]
    return table(["nats beyond the window, gap in windows", *map(str, windows), "seeds"], rows)


def made_with(data: dict[str, Any]) -> str:
    """Command, date, machine and versions of a file of results, in one sentence."""
    machine = data["machine"]
    versions = f"torch {machine['torch']}, moshi {machine['moshi']}, python {machine['python']}"
    return f"`{data['command']}`, {machine['date']}; {machine['cpu']}, {machine['threads']} thread; {versions}."
