"""`python -m finetune.data check FILE.jsonl [--tokenizer FILE] [--duration SECONDS] [--json]`: checks a dataset."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from ..common.program import program


@program("python -m finetune.data", logging.WARNING)
def main(argv: list[str], prog: str) -> int:
    """Exits with 1 if a problem was found, with 2 if a list or an option cannot be used."""
    from ..common.errors import ConfigError
    from ..settings.command_line import parse
    from ..settings.commands import CheckArgs

    command, words = argv[:1], argv[1:]
    if command != ["check"] and not {"-h", "--help"} & set(argv):
        raise ConfigError(f"{' '.join(command) or 'no command'}: must be check, as in `{prog} check FILE.jsonl`.")
    usage = "check FILE.jsonl ... [--tokenizer FILE] [--config FILE] [--duration SECONDS] [--json]"
    args = parse(CheckArgs, words if command == ["check"] else ["--help"], prog, usage)
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


if __name__ == "__main__":
    sys.exit(main())
