"""A disk that is full ends the run in one line, and leaves the last checkpoint and room for it to continue.

Instead of a disk, the largest file that the system lets the process write is small: writing fails as really.
"""

import contextlib
import re
from pathlib import Path

import pytest

from finetune.common.errors import DiskError
from finetune.training.run_dir import RunDir
from tests.support.checkpoint_runs import MODES, advance, arguments, tiny_run
from tests.support.disks import largest_file
from tests.support.tiny_repository import DATA
from tests.support.training_runs import Ended, Program
from tests.training.test_refused import write_settings

pytestmark = pytest.mark.slow


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("mode", ["adapter", "merged"])
def test_a_save_that_fails_at_any_file_leaves_nothing_behind(tmp_path, mode):
    args = arguments(tmp_path / "run", num_ckpt_keep=1, **MODES[mode])
    checkpointer, state = tiny_run(args)
    advance(state)
    with largest_file(0), pytest.raises(DiskError, match=r"File too large.*there is no other checkpoint"):
        checkpointer.save(state)
    assert names(checkpointer.folder) == []
    saved = checkpointer.save(state)
    sizes = {path.stat().st_size for path in saved.rglob("*") if path.is_file()}
    advance(state)
    for size in sizes:
        with largest_file(size - 1), pytest.raises(DiskError) as end:
            checkpointer.save(state)
        assert "checkpoint_000002: cannot be saved (" in str(end.value)
        assert "too large" in str(end.value).lower()
        assert f"the last complete checkpoint, {saved}, is intact" in str(end.value)
        assert names(checkpointer.folder) == ["checkpoint_000001"]
    assert checkpointer.save(state)
    assert names(checkpointer.folder) == ["checkpoint_000002"]


@pytest.fixture
def run(ttt_repo, tmp_path, capsys, caplog, monkeypatch, patched):
    """`train.py run.yaml WORDS`, in a folder with a base model and data, where no file may be larger than `largest`."""
    (tmp_path / "repo").symlink_to(ttt_repo)
    (tmp_path / "data").symlink_to(DATA)
    write_settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    program = Program(capsys, caplog)

    def start(*words: str, largest: int | None = None) -> Ended:
        with contextlib.nullcontext() if largest is None else largest_file(largest):
            return program("run.yaml", *words)

    start.folder = tmp_path
    return start


def test_a_run_that_cannot_save_ends_in_one_line_and_continues_when_there_is_room(run):
    assert run("--max_steps=2").returncode == 0
    full = run("--resume", "--max_steps=3", largest=50_000)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    line = full.stderr.splitlines()[-1]
    assert line.startswith("train.py: run/checkpoints/checkpoint_000003: cannot be saved (File too large); the last")
    assert "run/checkpoints/checkpoint_000002, is intact" in line
    assert names(run.folder / "run" / "checkpoints") == ["checkpoint_000002"]
    assert run("--resume", "--max_steps=3").returncode == 0
    assert names(run.folder / "run" / "checkpoints") == ["checkpoint_000002", "checkpoint_000003"]


def test_metrics_that_cannot_be_written_are_one_line(run):
    full = run("--run_dir=new", "--do_ckpt=false", "--max_steps=9", largest=4_000)
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    line = full.stderr.splitlines()[-1]
    assert re.match(r"train\.py: new/(metrics\.train\.jsonl|tensorboard): cannot be written \(File too large\); ", line)


def test_settings_that_cannot_be_written(tmp_path):
    with largest_file(100), pytest.raises(DiskError, match=r"run/args\.yaml: cannot be written \(File too large\)"):
        RunDir(arguments(tmp_path / "run")).start()
