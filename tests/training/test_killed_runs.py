"""kill -9 at any moment of a run, and again: what it has logged and saved at its end is as if it had never stopped.

`KILLS=50 pytest tests/training/test_killed_runs.py -s` tries 50 moments and says where they fell.
"""

import contextlib
import logging
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from finetune.checkpoint.best import read_best
from finetune.checkpoint.folders import list_checkpoints
from finetune.settings.record import from_dict
from finetune.training.metrics import read_metrics
from finetune.training.trainer import train
from tests.support.training_runs import settings_for

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("KILLS", "2"))
STEPS = 4 if KILLS < 10 else 12
FORGOTTEN = {"time", "steps_per_second", "tokens_per_second", "audio_seconds_per_second", "peak_memory_gib"}


@pytest.fixture(autouse=True)
def _patched(patched):
    """Training installs the patch for good; here it is gone after each test."""


def settings(repo: Path, run: Path) -> dict:
    ttt = {"enabled": True, "layers": [1], "chunk_size": 16, "learning_rate": 1e-2, "first_steps": 2}
    return settings_for(
        repo,
        run,
        max_steps=STEPS,
        ckpt_freq=1,
        num_ckpt_keep=1,
        do_eval=True,
        eval_freq=2,
        sample_freq=int(KILLS > 2),
        duration_sec=3,
        ttt=ttt,
        checkpoint={"resume": True},
    )


def start(settings: dict) -> int:
    """A process that trains, or goes on."""
    child = os.fork()
    if child == 0:
        logging.disable(logging.CRITICAL)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.suppress(BaseException):
            train(from_dict(settings))
            os._exit(0)
        os._exit(1)
    return child


def wait_or_kill(child: int, seconds: float | None) -> int:
    """The exit status of `child`, which is killed when it still runs after so many seconds; -9 then."""
    end = time.monotonic() + (seconds or 1e9)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)


def logged(run: Path) -> dict[str, list[dict]]:
    return {
        kind: [
            {key: value for key, value in entry.items() if key not in FORGOTTEN}
            for entry in read_metrics(run / f"metrics.{kind}.jsonl")
        ]
        for kind in ("train", "eval", "recordings")
    }


def place(run: Path) -> tuple[int, int]:
    """The last logged step, and the newest checkpoint."""
    entries = read_metrics(run / "metrics.train.jsonl")
    return entries[-1]["step"] if entries else 0, max(list_checkpoints(run / "checkpoints"), default=0)


def test_runs_that_are_killed_again_and_again_lose_nothing(stock_repo, tmp_path):
    began = time.monotonic()
    straight = settings(stock_repo, tmp_path / "straight")
    assert os.waitpid(start(straight), 0)[1] == 0
    seconds = time.monotonic() - began
    expected, moments, generator, number = logged(tmp_path / "straight"), [], random.Random(0), 0
    while len(moments) < KILLS:
        number += 1
        run = settings(stock_repo, tmp_path / f"run{number}")
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            child = start(run)
            deadline = generator.uniform(0.1, 0.7) * seconds if len(moments) < KILLS else None
            status = wait_or_kill(child, deadline)
            if status == -signal.SIGKILL:
                moments.append(place(Path(run["run_dir"])))
        assert status == 0
        assert logged(Path(run["run_dir"])) == expected
        evaluated = {entry["step"]: entry["loss"] for entry in expected["eval"]}
        best = read_best(Path(run["run_dir"]) / "checkpoints")
        assert (best.step, best.loss) == min(evaluated.items(), key=lambda item: item[1])
        assert list_checkpoints(Path(run["run_dir"]) / "checkpoints").keys() == {best.step, STEPS}
        shutil.rmtree(run["run_dir"])
    print(f"{len(moments)} kills in {number} runs; last logged step and newest checkpoint at each: {moments}")
