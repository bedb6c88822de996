"""Shared by the tests that run moshi's own programs: a tiny local repository and the environment of a subprocess."""

import os
import subprocess
import sys
from pathlib import Path

import sphn
import torch

ROOT = Path(__file__).parents[2]
DATA = ROOT / "example" / "data"

ENVIRONMENT = os.environ | {"NO_TORCH_COMPILE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""For subprocesses. One thread: on layers this small several only wait for each other."""


def build_repo(folder: Path, ttt: bool = True, **lm_overrides) -> Path:
    """The repository that `example/tiny_repo.py` makes, with TTT unless told otherwise, made with one thread."""
    from example.tiny_repo import make_tiny_repo

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return make_tiny_repo(folder, ttt=ttt, **lm_overrides)
    finally:
        torch.set_num_threads(threads)


def stream_speech(out: Path, *options: object) -> float:
    """A dialogue of the example through `moshi.run_inference` with `options`: seconds of the answer, which is `out`."""
    command = [sys.executable, "-m", "moshi_patch", "moshi.run_inference", "--device", "cpu", "--batch-size", "1"]
    streamed = subprocess.run(
        [*command, *map(str, options), str(DATA / "sister.wav"), str(out)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert streamed.returncode == 0, streamed.stderr
    return sphn.durations([str(out)])[0]
