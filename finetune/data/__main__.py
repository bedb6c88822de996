"""`python -m finetune.data check LIST.jsonl ...` checks a data set; `... split SOURCE OUT` makes lists of it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from ..common.program import program

USAGES = {
    "check": "check LIST.jsonl ... [--tokenizer FILE] [--config FILE] [--duration SECONDS] [--json]",
    "split": "split SOURCE OUT [--held-out SHARE] [--seed N]",
}


@program("python -m finetune.data", logging.WARNING)
def main(argv: list[str], prog: str) -> int:
    """Exits with 1 if a problem was found, with 2 if a list or an option cannot be used."""
    from ..common.errors import ConfigError
    from ..settings.command_line import parse
    from ..settings.commands import CheckArgs, SplitArgs

    command, words = " ".join(argv[:1]), argv[1:]
    if command not in USAGES and not {"-h", "--help"} & set(argv):
        raise ConfigError(
            f"{command or 'no command'}: must be check or split, as in `{prog} {USAGES['check']}` or "
            f"`{prog} {USAGES['split']}`."
        )
    if command == "split":
        return _split(parse(SplitArgs, words, prog, USAGES[command]))
    usage = USAGES["check"] if command in USAGES else f"\n       {prog} ".join(USAGES.values())
    return _check(parse(CheckArgs, words if command == "check" else ["--help"], prog, usage))


def _check(args) -> int:
    from ..common.errors import ConfigError
    from ..common.files import read_json
    from ..settings.limits import require
    from ..settings.sources import parse_sources
    from .check import Options, check

    try:
        files = [file for spec in args.data for source in parse_sources(spec) for file in source.files]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    for key in ("tokenizer", "config"):
        path = getattr(args, key)
        require(path is None or os.path.isfile(path), key, path, "no such file.")
    config = None if args.config is None else read_json(Path(args.config))
    tokenizer = None if args.tokenizer is None else Path(args.tokenizer)
    report = check(files, Options(tokenizer, config, args.duration, keep_all=args.json))
    print(report.to_json() if args.json else report.to_text())
    return 1 if report.problems else 0


def _split(args) -> int:
    from .split import EVAL, TRAIN, split

    out = Path(args.out)
    found = split(Path(args.source), out, args.held_out, args.seed)
    for line in [*found.remarks, *(f"left out: {line}" for line in found.broken)]:
        print(line)
    for name, entries in ((TRAIN, found.train), (EVAL, found.held_out)):
        hours = sum(entry.duration for entry in entries) / 3600
        print(f"{out / name}: {len(entries)} conversations, {hours:.2f} hours")
    return 0


if __name__ == "__main__":
    sys.exit(main())
