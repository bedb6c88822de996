"""Trains Moshi with In-Place TTT: `torchrun --nproc-per-node N train.py FILE.yaml [--resume [STEP]] [--key value]`."""

import sys

from finetune.training.__main__ import main

if __name__ == "__main__":
    sys.exit(main(prog="train.py"))
