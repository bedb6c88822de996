"""`python -m finetune.data check FILE.jsonl [--json]`: checks a dataset before training."""

from __future__ import annotations

import argparse
import logging
import sys

from ..common.program import program


@program("python -m finetune.data", logging.WARNING)
def main(argv: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Tools for datasets.")
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="report everything that training would stumble over")
    checking.add_argument("data", nargs="+", metavar="FILE.jsonl", help="lists, or folders of lists")
    checking.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(argv)
    from ..settings.sources import parse_sources
    from .check import check

    try:
        files = [file for spec in args.data for source in parse_sources(spec) for file in source.files]
        report = check(files)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report.to_json() if args.json else "\n".join([*map(str, report.problems + report.notes), report.summary()]))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
