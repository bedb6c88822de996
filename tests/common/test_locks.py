"""One process holds a file; the next is told who does; a process that was killed holds nothing."""

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from finetune.common.errors import ConfigError
from finetune.common.locks import FileLock


def lock(folder: Path) -> FileLock:
    return FileLock(folder / ".lock", "run_dir='here'", "wait.")


def holder(folder: Path) -> int:
    """A process that holds the lock until it is killed."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        lock(folder).acquire()
        os.write(told, b"!")
        signal.pause()
        os._exit(0)
    os.read(ready, 1)
    return child


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_the_second_is_refused_by_name_and_may_when_the_first_was_killed(tmp_path):
    child = holder(tmp_path)
    try:
        with pytest.raises(ConfigError) as refused:
            lock(tmp_path).acquire()
    finally:
        end(child)
    expected = (
        rf"run_dir='here': in use by process {child} on {re.escape(socket.gethostname())} since \d{{4}}-.*; wait\."
    )
    assert re.fullmatch(expected, str(refused.value))
    mine = lock(tmp_path)
    mine.acquire()  # kill -9 leaves its file, and no lock
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_within_one_process_too_and_not_twice_by_its_holder(tmp_path):
    mine = lock(tmp_path)
    mine.acquire()
    mine.acquire()
    with pytest.raises(ConfigError, match=f"process {os.getpid()} "):
        lock(tmp_path).acquire()
    mine.release()
    mine.release()
    lock(tmp_path).acquire()


def test_a_folder_that_was_moved_is_freed_where_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    mine = lock(tmp_path / "run")
    mine.acquire()
    (tmp_path / "run").rename(tmp_path / "aside")
    mine.release(moved_to=tmp_path / "aside" / ".lock")
    assert list((tmp_path / "aside").iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"\xff" * 300, b'{"pid": null}'])
def test_whatever_stands_in_the_file_the_refusal_is_one_line(tmp_path, content):
    mine = lock(tmp_path)
    mine.acquire()
    (tmp_path / ".lock").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        lock(tmp_path).acquire()
    assert "\n" not in str(refused.value)
    assert "in use by process" in str(refused.value)
