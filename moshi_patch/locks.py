"""A lock on a file: one process has it, the next is told which one. The system frees it when the process ends."""

import contextlib
import fcntl
import logging
import os
import socket
import time
from pathlib import Path

logger = logging.getLogger(__name__)


class FileLock:
    """Held from `acquire` to `release`, or until the process ends, killed or not.

    The lock is on a file of its own, so the file it stands for may be replaced meanwhile.

    Args:
        path: of the lock file, in a folder that exists. It names the process that has the lock; `release` removes it,
            and one that a killed process left locks nothing.
    """

    def __init__(self, path: Path):
        self.path = path
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock. On a disk that knows no locks, a warning is logged instead.

        Raises:
            BlockingIOError: when another process has it; its text names that process and its machine.
            OSError: when the lock file cannot be written.
        """
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(descriptor, 300).decode(errors="replace").strip()
                os.close(descriptor)
                raise BlockingIOError(owner or "another process") from None
            except OSError as error:
                os.close(descriptor)
                logger.warning(
                    "%s cannot be locked (%s): make sure that nobody else uses it.", self.path, error.strerror
                )
                return
            if self._is_current(descriptor):
                break
            os.close(descriptor)  # the one who held it has removed it since it was opened
        self._descriptor = descriptor
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(descriptor, 0)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode())

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Gives the lock back, and removes its file. Without the lock nothing happens."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            os.close(self._descriptor)
            self._descriptor = None
