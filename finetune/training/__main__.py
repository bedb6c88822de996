"""`python -m finetune.training FILE.yaml [--resume [STEP]] [--key value]`: trains, as `train.py` does."""

from __future__ import annotations

import logging
import os
import sys
import threading

from ..common.program import program


@program("python -m finetune.training")
def main(argv: list[str], prog: str) -> None:
    from ..settings.command_line import parse_with_sources, shown_settings, wants_settings_shown
    from ..settings.parsing import flat
    from ..settings.record import to_dict

    show, argv = wants_settings_shown(argv)
    args, sources = parse_with_sources(argv, prog)
    if show:
        if os.environ.get("RANK", "0") == "0":
            print(shown_settings(flat(to_dict(args)), sources))
        return
    from .trainer import train

    threading.excepthook = _failed_thread
    text = train(args)
    if text:
        print(text)


def _failed_thread(failure: threading.ExceptHookArgs) -> None:
    """One line for tensorboard's thread on a full disk: the run itself meets that error next, and ends with it."""
    if isinstance(failure.exc_value, OSError):
        logging.warning("In the background: %s", failure.exc_value)
    else:
        threading.__excepthook__(failure)


if __name__ == "__main__":
    sys.exit(main())
