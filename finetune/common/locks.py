"""A file that one process at a time may hold: the next one is told who does. The system frees it with the process."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from datetime import datetime
from pathlib import Path

from .errors import ConfigError
from .files import parse_object

logger = logging.getLogger(__name__)


class FileLock:
    """Held from `acquire` to `release`, or to the end of the process, however that comes.

    Args:
        path: of the lock file, in a folder that exists. It holds who has the lock, and is removed on release.
        what: that is locked, for the message, such as `run_dir='runs/first'`.
        remedy: what someone who is refused can do.
    """

    def __init__(self, path: Path, what: str, remedy: str):
        self.path, self._what, self._remedy = path, what, remedy
        self._file: int | None = None

    def acquire(self) -> None:
        """Takes the lock, or does nothing when it is held already by this object.

        Raises:
            ConfigError: when another process has it; names it, its machine and since when.
        """
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(file, 1000)
                os.close(file)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise ConfigError(f"{self._what}: in use by {_in_words(holder)}; {self._remedy}") from error
                logger.warning("%s cannot be locked on this disk (%s); start nothing else there.", self.path, error)
                return
            if _is_still(self.path, file):
                self._file = file
                _write_holder(file)
            else:  # it was released, and removed, in between
                os.close(file)

    def release(self, moved_to: Path | None = None) -> None:
        """Gives the lock back; `moved_to` is where its file is now, if its folder was renamed."""
        if self._file is None:
            return
        (moved_to or self.path).unlink(missing_ok=True)
        os.close(self._file)
        self._file = None


def _write_holder(file: int) -> None:
    content = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
    with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(content).encode(), 0)


def _is_still(path: Path, file: int) -> bool:
    """Whether the open `file` is the one that `path` names."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _in_words(holder: bytes) -> str:
    known = parse_object(holder) or {}
    return f"process {known.get('pid', '?')} on {known.get('host', '?')} since {known.get('since', '?')}"
