"""Files that hold secrets, of tokens or a key: read only while nobody else can read them."""

import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger(__name__)

LARGEST = 1 << 20
"""Bytes."""


def read_secret_file(path: str | Path) -> bytes:
    """The content of a small file that is for its owner alone. One that its group may read is read with a warning.

    Raises:
        OSError: in one line that names the file, when it cannot be read.
        ValueError: likewise, when others may read or write it, its group may write it, or it is over 1 MiB.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path}: must be a file.")
            mode = stat.S_IMODE(status.st_mode)
            if mode & (stat.S_IRWXO | stat.S_IWGRP):
                raise ValueError(f"{path}: others may read or change it (mode {mode:03o}): chmod 600 {path}")
            if mode & stat.S_IRGRP:
                logger.warning("%s: its group may read it (mode %03o).", path, mode)
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise OSError(f"{path}: cannot be read ({error.strerror}).") from error
    if len(content) > LARGEST:
        raise ValueError(f"{path}: more than {LARGEST >> 20} MiB, which no such file has.")
    return content
