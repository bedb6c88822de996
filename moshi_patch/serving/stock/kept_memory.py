"""The memory that a server's conversations go on with: one file, held by one server, read and written between them."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ...locks import FileLock
from ...memory import fast_weight_tensors, fingerprint, load_memory, save_memory

logger = logging.getLogger(__name__)


class KeptMemory:
    """The file of one person's memory. Every message names it as `--memory PATH`.

    Args:
        path: in a folder that exists; a link stays one, and is the same memory as what it points to.
    """

    def __init__(self, path: Path):
        self.path = path
        self._place = path.resolve()
        self._fingerprint: dict[str, Any] | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other server may have this memory.

        Raises:
            OSError: when another one has it, which and what to do; or when the file or its folder cannot be used.
        """
        lock = FileLock(self._place.with_name(f".{self._place.name}.lock"))
        try:
            lock.acquire()
        except BlockingIOError as owner:
            raise OSError(
                f"--memory {self.path}: in use by another server, {owner}. Stop that one, or give this one a file of "
                "its own: one memory is one person's."
            ) from None
        except OSError as error:
            raise OSError(f"--memory {self.path}: its folder cannot be written to ({error.strerror}).") from error
        try:
            if self._place.exists():
                self._place.open("rb").close()
        except OSError as error:
            lock.release()
            raise OSError(f"--memory {self.path}: cannot be read ({error.strerror}).") from error
        try:
            yield
        finally:
            lock.release()

    def check(self, model: nn.Module) -> None:
        """Remembers which model this is, and loads the memory once, to be refused now rather than in a conversation.

        Raises:
            ValueError, OSError: when the memory cannot be continued with this model, with the reason.
        """
        with self._named():
            self._fingerprint = fingerprint(model)
        self.load(model)

    def load(self, model: nn.Module) -> None:
        """Gives the freshly reset `model` what the file holds; without a file it stays fresh.

        Raises:
            ValueError, OSError: when the file cannot be used, with the reason.
        """
        if not self._place.exists():
            logger.info("--memory %s: no file yet, so this memory begins empty.", self.path)
            return
        with self._named():
            load_memory(model, self._place, self._fingerprint)
        logger.info("--memory %s: loaded, %s.", self.path, self._size(model))

    def save(self, model: nn.Module) -> None:
        """Writes what `model` has learnt, whole or not at all. A failure is logged and leaves the file as it was."""
        try:
            save_memory(model, self._place, self._fingerprint)
        except (ValueError, OSError) as error:
            self.not_saved(error)
        else:
            logger.info("--memory %s: saved, %s.", self.path, self._size(model))

    def not_saved(self, reason: object) -> None:
        """Logs that the file is as before, and why."""
        logger.error("--memory %s: not saved, the file is as before: %s", self.path, reason)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            raise type(error)(f"--memory {self.path}: {error}") from error

    def _size(self, model: nn.Module) -> str:
        """How much a memory holds: bytes, sound heard, updates made."""
        heard = {name: t for name, t in fast_weight_tensors(model).items() if name.endswith((".position", ".updates"))}
        steps = max(int(tensor.max()) for name, tensor in heard.items() if name.endswith(".position"))
        updates = sum(int(tensor.max()) for name, tensor in heard.items() if name.endswith(".updates"))
        mebibytes = self._place.stat().st_size / 2**20
        return f"{mebibytes:.1f} MiB after {steps} steps of 80 ms and {updates} updates in {len(heard) // 2} layers"
