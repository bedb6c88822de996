"""`python -m finetune.evaluation --checkpoint_dir PATH [--key value]`: as `eval_from_checkpoint.py`."""

from __future__ import annotations

import sys

from ..common.program import program


@program("python -m finetune.evaluation")
def main(argv: list[str], prog: str) -> None:
    from ..settings.command_line import evaluation_options

    given = evaluation_options(argv, prog)
    from .run import evaluate
    from .settings_in_force import load_settings

    print(evaluate(load_settings(*given)), end="")


if __name__ == "__main__":
    sys.exit(main())
