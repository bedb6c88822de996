"""The generated parts of docs/evidence.md: every table, from the results alone.

The page is written by hand around markers. `render` replaces what stands between `<!-- name -->` and
`<!-- end name -->`.
"""

from functools import partial

from benchmarks.measure import fill

from . import more_tables, tables  # noqa: F401  they register their blocks
from .blocks import BLOCKS
from .grid import Cell
from .results import Line, Results


def render(page: str, cells: list[Cell], lines: dict[str, Line]) -> str:
    """The page with every marked part made anew.

    Raises:
        ValueError: for a marker without its end, or one whose name is not known.
    """
    results = Results(cells, lines)
    return fill(page, {name: partial(part, results) for name, part in BLOCKS.items()})
