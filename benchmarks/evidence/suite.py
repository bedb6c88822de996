"""The command of the evidence suite: runs a grid of small trainings, then makes the tables and figures of its page.

`python -m benchmarks.evidence [--grid evidence|recall|plateau|hybrid|FILE] [--budget 30m|4h] [--fresh] [--report-only]`

Every run adds one JSON line to the results as soon as it is over; a stopped suite, started again, goes on where it was.
`--fresh` keeps the old results aside and begins anew. With `--budget` the runs are done in the order of the grid's
priorities, the first seed of every cell first, as long as the next one is expected to fit; the page lists what is
missing. A budget that outlasts the grid goes into further seeds of every cell.

A grid in a FILE of one's own writes beside its results and leaves the committed pages alone.
"""

import argparse
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import moshi_patch
from finetune.common.errors import ConfigError
from finetune.common.program import program

from .grid import read_grid
from .report import plateau, plots, recall, updates
from .report.page import render
from .results import Results
from .runner import run_all
from .store import Store

ROOT = Path(__file__).parents[2]
GRIDS = Path(__file__).parent / "grids"
RESULTS = ROOT / "benchmarks" / "results"
SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Page:
    """Where a committed grid is shown: the page, its figures by the name of their file, and its further pages."""

    file: Path
    figures: dict[str, Callable[[Results], plt.Figure | None]]
    appendix: tuple[Path, ...] = ()
    results: str | None = None
    """Name of the file of results, where it is not the grid's."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The page and its appendix."""
        return (self.file, *self.appendix)


PAGES = {
    "evidence": Page(
        ROOT / "docs" / "evidence.md",
        {
            "evidence_memory": plots.draw_memory,
            "evidence_settings": plots.draw_settings,
            "evidence_streams": plots.draw_streams,
            "evidence_continued": plots.draw_continued,
            "evidence_updates": updates.draw_updates,
        },
        (ROOT / "docs" / "evidence_tables.md",),
    ),
    "recall": Page(ROOT / "docs" / "evidence_recall.md", {"recall": recall.draw}),
    "plateau": Page(ROOT / "docs" / "evidence_plateau.md", {"plateau": plateau.draw}),
    "hybrid": Page(ROOT / "docs" / "evidence_hybrid.md", {}, results="evidence_hybrid"),
}


def parse_budget(text: str) -> float:
    """Seconds of `"90s"`, `"1m"`, `"30m"` or `"4h"`.

    Raises:
        ConfigError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) == 0:
        raise ConfigError(f"--budget {text}: must be a number with a unit, such as 90s, 1m, 30m or 4h.")
    return float(match[1]) * SECONDS[match[2]]


def parse_arguments(argv: list[str], prog: str) -> argparse.Namespace:
    """Reads the command line; files that it does not name follow from the grid."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--grid", default="evidence", help=f"{', '.join(PAGES)} or a YAML file; default: evidence")
    parser.add_argument("--results", type=Path, help="a JSONL file; default: that of the grid")
    parser.add_argument("--doc", type=Path, help="the page to fill; default: that of the grid")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="where figures go; default: beside the results")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "evidence", help="trained models")
    parser.add_argument("--budget", help="such as 1m, 30m or 4h; default: the whole grid once")
    parser.add_argument("--fresh", action="store_true", help="set the results aside and begin anew")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    committed = args.grid in PAGES
    args.page = PAGES[args.grid if committed else "evidence"]
    args.grid = GRIDS / f"{args.grid}.yaml" if committed else Path(args.grid)
    args.results = args.results or (
        RESULTS / f"{args.page.results or args.grid.stem}.jsonl" if committed else args.grid.with_suffix(".jsonl")
    )
    args.doc = args.doc or (args.page.file if committed else args.results.with_suffix(".md"))
    args.plots = args.plots or args.results.parent
    return args


@program("python -m benchmarks.evidence", logging.WARNING)
def main(argv: list[str], prog: str) -> None:
    """Run, report, and say what was done."""
    args = parse_arguments(argv, prog)
    torch.set_num_threads(args.threads)
    cells = read_grid(args.grid)
    budget = parse_budget(args.budget) if args.budget else None
    store = Store(args.results, fresh=args.fresh)
    if not args.report_only:
        moshi_patch.install()
        if args.fresh:
            for file in args.cache.glob("*.pt"):
                file.unlink()
        done = run_all(cells, store, budget, args.cache)
        print(f"{len(done['executed'])} runs done, {len(done['left_out'])} left out for the budget")
    for path in report(Results(cells, store.runs), args):
        print(f"written: {path}")


def report(results: Results, args: argparse.Namespace) -> list[Path]:
    """Draw every figure that there are runs for and fill the page; returns the files."""
    written = []
    args.plots.mkdir(parents=True, exist_ok=True)
    for name, draw in args.page.figures.items():
        figure = draw(results)
        if figure is not None:
            written.append(args.plots / f"{name}.png")
            figure.savefig(written[-1], dpi=90, pil_kwargs={"optimize": True})
            plt.close(figure)
    own = args.doc != args.page.file
    for file in (args.doc,) if own else args.page.files:
        templates = (file,) if file.exists() else args.page.files
        file.write_text(render("\n".join(template.read_text() for template in templates), results))
        written.append(file)
    return written
