"""Tables of text: columns for a terminal, and Markdown."""

from collections.abc import Iterable, Sequence

Row = Sequence[object]


def columns(heading: Row, rows: Iterable[Row]) -> str:
    """Aligned columns with a line below the heading; columns of numbers alone stand on the right.

    Raises:
        ValueError: for a row that is not as long as the heading.
    """
    cells = [[str(cell) for cell in row] for row in (heading, *rows)]
    by_column = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in by_column]
    right = [all(_numeric(cell) for cell in column[1:]) for column in by_column]
    lines = [
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def markdown(heading: Row, rows: Iterable[Row], *, numbers_right: bool = False) -> str:
    """A Markdown table; in a cell a `|` is escaped, and lines become one.

    Args:
        numbers_right: all columns but the first stand on the right.

    Raises:
        ValueError: for a row that is not as long as the heading.
    """
    rule = ["---"] + ["---:" if numbers_right else "---"] * (len(heading) - 1)
    lines = [[" ".join(str(cell).split("\n")).replace("|", "\\|") for cell in row] for row in (heading, *rows)]
    if any(len(line) != len(heading) for line in lines):
        raise ValueError(f"a row of a table has {len(heading)} cells: {heading!r}")
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def _numeric(cell: str) -> bool:
    return not cell or cell[0] in "+-0123456789"
