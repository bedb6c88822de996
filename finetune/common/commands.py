"""The commands that a program prints for a user to go on with, such that they run as printed."""

import os
import shlex
import shutil
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPTS = {"train": "train.py", "evaluate": "eval_from_checkpoint.py"}
"""Programs that are files at the top of a checkout."""


def command(program: str, *words: object) -> str:
    """How to call `program` (`train`, `evaluate`, `export`, `doctor`, ...) with `words` from the working directory."""
    return shlex.join([*program_words(program), *map(str, words)])


def program_words(program: str) -> list[str]:
    """The beginning of a command: as the README has it in a checkout's folder, `moshi-ttt PROGRAM` once installed."""
    if not (CHECKOUT / "train.py").is_file():
        return ["moshi-ttt", program]
    here = os.path.relpath(CHECKOUT)
    if program in SCRIPTS:
        return [python(), os.path.normpath(f"{here}/{SCRIPTS[program]}")]
    if here == ".":
        return [python(), "-m", f"finetune.{program}"]
    return [python(), f"{here}/moshi_ttt.py", program]


def torchrun_words(world_size: int) -> list[str]:
    """How to start training on `world_size` processes, as many on each machine as now."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    beside = Path(sys.executable).with_name("torchrun")
    found = shutil.which("torchrun")
    known = found and beside.exists() and os.path.samefile(found, beside)
    words = ["torchrun"] if known else [python(), "-m", "torch.distributed.run"]
    if each < world_size:
        host, name = os.environ.get("MASTER_ADDR", "HOST"), os.environ.get("TORCHELASTIC_RUN_ID", "moshi")
        words += ["--nnodes", str(world_size // each), "--rdzv-backend", "c10d", "--rdzv-id", name]
        words += ["--rdzv-endpoint", f"{host}:29500"]
    program = program_words("train")
    return [
        *words,
        "--nproc-per-node",
        str(each),
        *(program[1:] if program[0] != "moshi-ttt" else ["-m", "finetune.training"]),
    ]


def python() -> str:
    """`python`, where that is the interpreter that runs now; otherwise its path."""
    found = shutil.which("python")
    return "python" if found and os.path.samefile(found, sys.executable) else sys.executable
