"""Evaluates a checkpoint: `torchrun --nproc-per-node N eval_from_checkpoint.py --checkpoint_dir PATH [--key value]`."""

import sys

from finetune.evaluation.__main__ import main

if __name__ == "__main__":
    sys.exit(main(prog="eval_from_checkpoint.py"))
