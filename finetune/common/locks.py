"""A file that one process at a time may hold, as `moshi_patch` has it, refused in the words of a setting."""

from pathlib import Path

import moshi_patch

from .errors import ConfigError


class FileLock(moshi_patch.FileLock):
    """Held from `acquire` to `release`, or to the end of the process, however that comes.

    Args:
        path: of the lock file, in a folder that exists. It holds who has the lock, and is removed on release.
        what: that is locked, for the message, such as `run_dir='runs/first'`.
        remedy: what someone who is refused can do.
    """

    def __init__(self, path: Path, what: str, remedy: str):
        super().__init__(path)
        self._what, self._remedy = what, remedy

    def acquire(self) -> None:
        """Takes the lock, or does nothing when it is held already by this object.

        Raises:
            ConfigError: when another process has it; names it, its machine and since when.
        """
        try:
            super().acquire()
        except BlockingIOError as holder:
            raise ConfigError(f"{self._what}: in use by {holder}; {self._remedy}") from None
