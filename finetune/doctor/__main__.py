"""`python -m finetune.doctor [CHECKPOINT] [--json]`: checks this machine and, if given, a checkpoint.

Each finding is a line that begins with ok, warning or FAILED. Exits with 1 if anything failed, else with 0.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..common.program import program
from .finding import FAILED, OK, Finding


@program("python -m finetune.doctor", logging.WARNING)
def main(argv: list[str], prog: str) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a run, a checkpoint of it, or an export")
    parser.add_argument(
        "--base",
        metavar="PATH",
        help="the base model of adapters: a Hub repository, a folder like one, or its .safetensors file; "
        "by default as the checkpoint was trained",
    )
    parser.add_argument("--device", default="cpu", help="where the model is loaded (default: cpu)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device {args.device}: must be cpu, cuda or cuda:0, cuda:1, ...")
    found = []
    for check in _checks(args):
        found.append(check)
        if not args.json:
            print(check.line(), flush=True)
    good = all(check.status != FAILED for check in found)
    if args.json:
        content = {"ok": good, "checkpoint": args.checkpoint, "checks": [check.to_dict() for check in found]}
        print(json.dumps(content, indent=2, allow_nan=False))
    else:
        counts = [f"{sum(check.status == status for check in found)} {status}" for status in (OK, "warning", FAILED)]
        print(", ".join(counts))
    return 0 if good else 1


def _checks(args: argparse.Namespace) -> Iterator[Finding]:
    from .machine import check_machine

    found = []
    for check in check_machine(Path(args.checkpoint or ".")):
        found.append(check)
        yield check
    if args.checkpoint is None:
        return
    if any(check.status == FAILED for check in found):
        yield Finding("checkpoint", FAILED, "not looked at, as this machine is not ready", "first what failed above")
        return
    from .checkpoint import check_checkpoint

    yield from check_checkpoint(Path(args.checkpoint), args.base, args.device)


if __name__ == "__main__":
    sys.exit(main())
