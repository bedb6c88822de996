"""`python -m finetune.doctor [CHECKPOINT] [--json]`: checks this machine and, if given, a checkpoint.

Each finding is a line that begins with ok, warning or FAILED. Exits with 1 if anything failed, else with 0.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.program import program

if TYPE_CHECKING:
    from ..settings.commands import DoctorArgs
    from .finding import Finding


@program("python -m finetune.doctor", logging.WARNING)
def main(argv: list[str], prog: str) -> int:
    from ..common.errors import ConfigError
    from ..settings.command_line import parse
    from ..settings.commands import DoctorArgs
    from .finding import FAILED, OK

    args = parse(
        DoctorArgs, argv, prog, "[CHECKPOINT] [--base PATH] [--expect-layers LAYERS] [--device DEVICE] [--json]"
    )
    if args.expect_layers is not None and args.checkpoint is None:
        raise ConfigError(f"expect_layers={args.expect_layers!r}: needs a CHECKPOINT to look at.")
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


def _checks(args: DoctorArgs) -> Iterator[Finding]:
    from .finding import FAILED, Finding
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

    yield from check_checkpoint(Path(args.checkpoint), args.base, args.device, args.expect_layers)


if __name__ == "__main__":
    sys.exit(main())
