"""Trains Moshi with In-Place TTT: `torchrun --nproc-per-node N train.py FILE.yaml [--resume [STEP]] [--key value]`."""

import logging
import os
import sys
import threading

from finetune.common.errors import ConfigError, DiskError
from finetune.data.broken import BrokenData
from finetune.settings.command_line import parse_command_line
from finetune.training.trainer import TrainingDiverged, train


def main() -> None:
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        train(parse_command_line(sys.argv[1:]))
    except (ConfigError, BrokenData, DiskError, TrainingDiverged) as error:
        sys.exit(f"train.py: {error}")


def _failed_thread(failure: threading.ExceptHookArgs) -> None:
    """One line for tensorboard's thread on a full disk: the run itself meets that error next, and ends with it."""
    if isinstance(failure.exc_value, OSError):
        logging.warning("In the background: %s", failure.exc_value)
    else:
        threading.__excepthook__(failure)


if __name__ == "__main__":
    threading.excepthook = _failed_thread
    main()
