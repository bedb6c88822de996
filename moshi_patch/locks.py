"""A file that one process at a time may hold: the next one is told who does. The system frees it with the process."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from .json_object import parse_object

logger = logging.getLogger(__name__)


class FileLock:
    """Held from `acquire` to `release`, or to the end of the process, killed or not.

    Args:
        path: of the lock file, in a folder that exists. It stands beside what is locked, which may be replaced
            meanwhile, says who has the lock, and is removed on release; what a killed process left locks nothing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock, or does nothing when this object has it. On a disk without locks it logs a warning instead.

        Raises:
            BlockingIOError: when another process has it; its text names that process, its machine and since when.
            OSError: when the lock file cannot be written.
        """
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 1000)
                os.close(descriptor)
                raise BlockingIOError(_in_words(holder)) from None
            except OSError as error:
                os.close(descriptor)
                logger.warning("%s cannot be locked on this disk (%s); use it from here alone.", self.path, error)
                return
            if _is_still(self.path, descriptor):
                self._descriptor = descriptor
                _write_holder(descriptor)
            else:  # it was released, and removed, in between
                os.close(descriptor)

    def release(self, moved_to: Path | None = None) -> None:
        """Gives the lock back; `moved_to` is where its file is now, if its folder was renamed."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(moved_to or self.path)
            os.close(self._descriptor)
            self._descriptor = None


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that `path` names."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    content = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(content).encode(), 0)


def _in_words(holder: bytes) -> str:
    try:
        known = parse_object(holder)
    except ValueError:  # not written yet, or not by us
        known = {}
    return "process {} on {} since {}".format(*(known.get(key, "?") for key in ("pid", "host", "since")))
