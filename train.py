"""Trains Moshi with In-Place TTT: `torchrun --nproc-per-node N train.py FILE.yaml [--resume [STEP]] [--key value]`."""

import logging
import os
import sys

from finetune.args import parse_command_line
from finetune.data.items import BrokenData
from finetune.parsing import ConfigError
from finetune.trainer import TrainingDiverged, train


def main() -> None:
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        train(parse_command_line(sys.argv[1:]))
    except (ConfigError, BrokenData, TrainingDiverged) as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    main()
