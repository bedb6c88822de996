"""Puts the tables into a page, from the results alone.

A page is written by hand around markers. `render` replaces what stands between `<!-- name -->` and
`<!-- end name -->`.
"""

from functools import partial

from benchmarks.pages import fill

from ..results import Results
from . import continued, hybrid, memory, plateau, recall, runs, spoken, streams, updates  # noqa: F401  they register their blocks
from .blocks import BLOCKS


def render(page: str, results: Results) -> str:
    """The page with every marked part made anew.

    Raises:
        ValueError: for a marker without its end, or one whose name is not known.
    """
    return fill(page, {name: partial(part, results) for name, part in BLOCKS.items()})
