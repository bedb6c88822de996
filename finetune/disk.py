"""What a disk that cannot be written to comes to: one line that names the file and what the system said."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from .parsing import in_one_line


class DiskError(RuntimeError):
    """A run cannot write what it has to; the message names the folder, and what the system said."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes an OSError over `path`, of a full disk for one, a DiskError."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path}: cannot be written ({error.strerror or error}); checkpoints that were complete are intact. Make "
            "room, and continue with --resume."
        ) from error


def reason_of(error: BaseException, folder: Path) -> str | None:
    """Why something could not be written to `folder`, in the system's words; None for an error of another kind.

    Torch hides those words at times; how much room there is then says more.
    """
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]  # of the first rank that had any
    if not isinstance(error, (OSError, SafetensorError, RuntimeError)):
        return None
    said: BaseException | None = error
    while said is not None and not isinstance(said, OSError):
        said = said.__cause__ or said.__context__
    if said is not None:
        return said.strerror or in_one_line(said)
    free = shutil.disk_usage(folder).free
    return f"{type(error).__name__}: {in_one_line(error)}, with {free / 2**20:.1f} MiB free on that disk"
