"""The evidence suite: runs a grid of small trainings and makes the tables and plots of docs/evidence.md from them.

`python -m benchmarks.evidence [--grid FILE] [--budget 1m|30m|4h] [--fresh] [--report-only]`

Every run adds one JSON line to the results as soon as it is over; a stopped suite, started again, goes on where it was.
`--fresh` keeps the old results aside and begins anew. With `--budget` the runs are done in the order of the grid's
priorities, the first seed of every cell first, as long as the next one is expected to fit; the page lists what is
missing. A budget that outlasts the grid goes into further seeds of every cell.
"""

import argparse
import logging
import re
from pathlib import Path

import torch

import moshi_patch

from .grid import read_grid
from .plots import draw_all
from .report import render
from .runner import run_all
from .store import Store

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results"
UNITS = {"s": 1, "m": 60, "h": 3600}


def parse_budget(text: str) -> float:
    """Seconds of `"90s"`, `"1m"`, `"30m"` or `"4h"`.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) == 0:
        raise ValueError(f"--budget {text}: must be a number with a unit, such as 90s, 1m, 30m or 4h.")
    return float(match[1]) * UNITS[match[2]]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=Path, default=HERE / "grids" / "evidence.yaml")
    parser.add_argument("--results", type=Path, default=RESULTS / "evidence.jsonl")
    parser.add_argument("--doc", type=Path, default=ROOT / "docs" / "evidence.md")
    parser.add_argument("--plots", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "evidence", help="trained models")
    parser.add_argument("--budget", help="such as 1m, 30m or 4h; default: the whole grid once")
    parser.add_argument("--fresh", action="store_true", help="set the results aside and begin anew")
    parser.add_argument("--report-only", action="store_true", help="run nothing")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run, report, and say what was done. Returns the exit code."""
    args = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    torch.set_num_threads(args.threads)
    try:
        cells = read_grid(args.grid)
        budget = parse_budget(args.budget) if args.budget else None
    except (ValueError, OSError) as error:
        print(error)
        return 2
    store = Store(args.results, fresh=args.fresh)
    if not args.report_only:
        moshi_patch.install()
        if args.fresh:
            for file in args.cache.glob("*.pt"):
                file.unlink()
        done = run_all(cells, store, budget, args.cache)
        print(f"{len(done['executed'])} runs done, {len(done['left_out'])} left out for the budget")
    args.doc.write_text(render(args.doc.read_text(), cells, store.runs))
    for path in draw_all(cells, store.runs, args.plots):
        print(f"written: {path}")
    print(f"written: {args.doc}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
