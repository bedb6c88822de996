"""`python -m finetune.data check FILE.jsonl [--tokenizer FILE] [--duration SECONDS] [--json]`: checks a dataset."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

from ..common.program import program


@program("python -m finetune.data", logging.WARNING)
def main(argv: list[str], prog: str) -> int:
    """Exits with 1 if a problem was found, with 2 if a list or an option cannot be used."""
    args = _parser(prog).parse_args(argv)
    from ..common.files import read_json
    from ..settings.sources import parse_sources
    from .check import Options, check

    try:
        files = [file for spec in args.data for source in parse_sources(spec) for file in source.files]
        config = None if args.config is None else read_json(args.config)
        report = check(files, Options(args.tokenizer, config, args.duration, keep_all=args.json))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report.to_json() if args.json else report.to_text())
    return 1 if report.problems else 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Tools for datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="report everything that training would stumble over")
    checking.add_argument("data", nargs="+", metavar="FILE.jsonl", help="lists, or folders of lists")
    checking.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="text tokenizer of the model: are the words known to it?"
    )
    checking.add_argument(
        "--config", type=Path, metavar="FILE", help="config.json of the model: its tokenizer and text conditions"
    )
    checking.add_argument(
        "--duration", type=_seconds, metavar="SECONDS", help="duration_sec of the training: how are files cut?"
    )
    checking.add_argument("--json", action="store_true", help="print all that was found as JSON")
    return parser


def _seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"{text}: must be a positive number of seconds")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
