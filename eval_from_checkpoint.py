"""Evaluates a checkpoint: `torchrun --nproc-per-node N eval_from_checkpoint.py --checkpoint_dir PATH [--key value]`."""

import logging
import os
import sys

from finetune.common.errors import ConfigError
from finetune.data.broken import BrokenData
from finetune.evaluation.run import evaluate
from finetune.evaluation.settings import parse_command_line


def main() -> None:
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        print(evaluate(parse_command_line(sys.argv[1:])), end="")
    except (ConfigError, BrokenData) as error:
        sys.exit(f"eval_from_checkpoint.py: {error}")


if __name__ == "__main__":
    main()
