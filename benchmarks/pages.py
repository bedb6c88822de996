"""Fills the generated tables of a page that is otherwise written by hand."""

import re
from collections.abc import Callable, Mapping


def fill(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """`page` with everything between `<!-- name -->` and `<!-- end name -->` made anew by the part of that name.

    Raises:
        ValueError: for a marker without its end, one that stands twice, or one whose name is not known.
    """
    for name in re.findall(r"<!-- (?!end )([a-z0-9_]+) -->", page):
        if name not in parts:
            raise ValueError(f"<!-- {name} -->: no such part; there are {', '.join(parts)}.")
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if end not in page:
            raise ValueError(f"{begin}: {end} is missing.")
        if page.count(begin) > 1:
            raise ValueError(f"{begin}: stands {page.count(begin)} times.")
        start, stop = page.index(begin) + len(begin), page.index(end)
        page = f"{page[:start]}\n{parts[name]()}\n{page[stop:]}"
    return page
