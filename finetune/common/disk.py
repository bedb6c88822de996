"""Turns what the system and libraries raise over files into errors of one line that name the file."""

import contextlib
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from .errors import ConfigError, DiskError, in_one_line

LIBRARY_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, OSError)
LIBRARY_ERRORS += (RuntimeError, StopIteration, TypeError, ValueError)
"""What moshi and torch raise for files and settings that are not as they expect."""

RESUME = "checkpoints that were complete are intact. Make room, and continue with --resume."


@contextlib.contextmanager
def writing(path: Path, then: str = RESUME) -> Iterator[None]:
    """Makes an OSError over `path`, of a full disk for one, a DiskError.

    Args:
        then: what is intact, and what to do.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror or error}); {then}") from error


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


@contextlib.contextmanager
def reading(what: str, remedy: str = "Correct moshi_paths, or copy the file anew.") -> Iterator[None]:
    """Turns what libraries raise over a user's file into a ConfigError of one line: `what`, their reason, `remedy`."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except pickle.UnpicklingError as error:  # torch's own text says how to run it all the same
        raise ConfigError(f"{what}: damaged, or a pickle of more than tensors, which is not run.") from error
    except (SafetensorError, EOFError) as error:
        raise ConfigError(f"{what}: damaged, or of another format ({in_one_line(error)}). Copy it anew.") from error
    except LIBRARY_ERRORS as error:
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        raise ConfigError(f"{what} ({reason}). {remedy}") from error
