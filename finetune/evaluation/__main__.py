"""`python -m finetune.evaluation --checkpoint_dir PATH [--key value]`: as `eval_from_checkpoint.py`."""

from __future__ import annotations

import os
import sys

from ..common.program import program


@program("python -m finetune.evaluation")
def main(argv: list[str], prog: str) -> None:
    from ..settings.command_line import evaluation_options, shown_settings, wants_settings_shown

    show, argv = wants_settings_shown(argv)
    given = evaluation_options(argv, prog)
    from .run import evaluate
    from .settings_in_force import load_settings

    if show:
        table = load_settings(*given).table()
        if os.environ.get("RANK", "0") == "0":
            print(shown_settings(*({key: one[name] for key, one in table.items()} for name in ("value", "source"))))
        return
    print(evaluate(load_settings(*given)), end="")


if __name__ == "__main__":
    sys.exit(main())
