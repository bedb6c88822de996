"""The generated parts of docs/evidence.md: every table, from the results alone.

The page is written by hand around markers. `render` replaces what stands between `<!-- name -->` and
`<!-- end name -->`.
"""

import re

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
    for name in re.findall(r"<!-- ([a-z_]+) -->", page):
        if name not in BLOCKS:
            raise ValueError(f"<!-- {name} -->: no such part; there are {', '.join(BLOCKS)}.")
        if f"<!-- end {name} -->" not in page:
            raise ValueError(f"<!-- {name} -->: <!-- end {name} --> is missing.")
        start = page.index(f"<!-- {name} -->") + len(f"<!-- {name} -->")
        stop = page.index(f"<!-- end {name} -->")
        page = f"{page[:start]}\n{BLOCKS[name](results)}\n{page[stop:]}"
    return page
