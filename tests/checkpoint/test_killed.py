"""kill -9 at any moment of a save leaves a checkpoint that loads."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune.checkpoint.folders import list_checkpoints
from finetune.settings.schema import TrainArgs
from tests.support.checkpoint_runs import MODES, advance, arguments, checkpointer_of, same, snapshot, tiny_run
from tests.support.loading import KEYS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("patched")]


def fork(action) -> int:
    """The exit status of `action` in a process of its own: -9 if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at(moment: int) -> None:
    """From now on, the `moment`-th operation that changes the disk for good is a SIGKILL instead."""
    left = [moment]

    def counted(operation):
        def run(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return run

    for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))


def assert_loadable(args: TrainArgs, by_step: dict[int, dict]) -> int:
    """The newest checkpoint holds, in both of its parts, what was there at its step, which is returned."""
    checkpointer, state = tiny_run(args, seed=5)
    path = checkpointer.find()
    checkpointer.load(path, state)
    assert same(snapshot(state), by_step[state.step])
    weights = load_file(path / "consolidated" / "lora.safetensors")
    trained = by_step[state.step]["content"][0]
    assert all(torch.equal(weights[key], trained[key]) for key in KEYS)
    return state.step


def test_kill_9_at_every_moment_of_a_save_leaves_a_checkpoint_and_the_next_save_cleans_up(tmp_path):
    args = arguments(tmp_path / "run", num_ckpt_keep=2, **MODES["adapter"])
    checkpointer, state = tiny_run(args)
    by_step = {}
    for _ in range(2):
        advance(state)
        by_step[state.step] = snapshot(state)
        checkpointer.save(state)
    advance(state)
    by_step[3] = snapshot(state)
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    newest, moment, status = [], 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        moment += 1
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "before", tmp_path / "run")
        status = fork(lambda moment=moment: (kill_at(moment), checkpointer.save(state)))
        newest.append(assert_loadable(args, by_step))
        if moment % 5 == 1:  # not after each, for time
            fork(lambda: (advance(state), checkpointer_of(args).save(state)))
            assert len(os.listdir(tmp_path / "run" / "checkpoints")) == 2
            assert checkpointer.find(4)
    assert status == 0
    assert newest == sorted(newest)
    assert newest.count(2) > 8
    assert newest.count(3) > 8  # while the oldest one is deleted


def wait_for_a_step_after(step: int, folder: Path) -> None:
    """Until a checkpoint of a later step is complete, however long this machine takes."""
    deadline = time.monotonic() + 60
    while max(list_checkpoints(folder), default=0) <= step:
        assert time.monotonic() < deadline, "nothing was saved"
        time.sleep(0.002)


def test_kill_9_at_any_time_leaves_a_checkpoint(tmp_path):
    args = arguments(tmp_path, num_ckpt_keep=1, **MODES["adapter"])
    checkpointer, state = tiny_run(args)
    advance(state)
    checkpointer.save(state)
    steps = [1]
    for number in range(5):
        child = os.fork()
        if child == 0:
            checkpointer, state = tiny_run(args)
            checkpointer.load(checkpointer.find(), state)
            while True:
                state.step += 1
                checkpointer.save(state)
        try:
            wait_for_a_step_after(steps[-1], tmp_path / "checkpoints")
            time.sleep(0.013 * number)
        finally:
            os.kill(child, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        checkpointer, state = tiny_run(args, seed=5)
        checkpointer.load(checkpointer.find(), state)
        steps.append(state.step)
    assert steps == sorted(set(steps))  # each time further on
