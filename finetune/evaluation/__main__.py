"""`python -m finetune.evaluation --checkpoint_dir PATH [--key value]`: as `eval_from_checkpoint.py`."""

from __future__ import annotations

import sys

from ..common.program import program


@program("python -m finetune.evaluation")
def main(argv: list[str], prog: str) -> None:
    from .settings import parse_command_line

    settings = parse_command_line(argv)
    from .run import evaluate

    print(evaluate(settings), end="")


if __name__ == "__main__":
    sys.exit(main())
