"""Shared by the tests of several gloo processes on the CPU: starts them, waits, and lets none survive the test."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.support.tiny_repository import ENVIRONMENT, ROOT


def run_processes(module: str, arguments: Sequence[Sequence[object]], logs: Path, *, seconds: float = 50) -> None:
    """`python -m MODULE`, once for each of `arguments` and at the same time; all have to succeed.

    Args:
        logs: a folder, for what they write.
        seconds: until all have ended; what runs then is killed.
    """
    files = [(logs / f"log{rank}.txt").open("w+") for rank in range(len(arguments))]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *map(str, words)],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        for words, file in zip(arguments, files, strict=True)
    ]
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
    finally:
        for process, file in zip(processes, files, strict=True):
            process.kill()
            process.wait()
            file.seek(0)
            print(file.read()[-4000:])  # pytest shows it when the test fails
            file.close()
    assert [process.returncode for process in processes] == [0] * len(processes)
