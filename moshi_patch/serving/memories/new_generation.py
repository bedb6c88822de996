"""Creates the next generation of a memory, such that of two writers one is told that it has lost."""

import logging
from collections.abc import Callable, Iterator

from ...errors import in_one_line
from .generation_file import Files, GenerationToWrite, mark_of
from .sealing import Sealer
from .store_files import StoredFile
from .store_types import Lost, StoreError

logger = logging.getLogger(__name__)

GENERATIONS_KEPT = 2
"""The newest one, and the one before it, in case a disk spoils the newest."""


def create_generation(
    files: Files, sealer: Sealer | None, content: GenerationToWrite, base: int, given_up: Callable[[], bool]
) -> int:
    """Creates generation `base + 1`, removes those before the last two, and returns its number.

    Args:
        given_up: asked on the way: once it is true, nothing appears any more.

    Raises:
        Lost: when there is a newer one than `base`, or `base` is gone.
        StoreError: when it was given up.
    """

    def check() -> None:
        _require_wanted(given_up)
        require_newest(base, [file.generation for file in files.list(content.folder)])

    target = base + 1
    check()
    size, pieces = content.pieces(target, sealer)
    try:
        files.create(content.folder, target, size, _until(given_up, pieces), check)
    except FileExistsError:  # also for who sends again what had arrived
        if mark_of(files, StoredFile(content.folder, target, size, 0.0), sealer) != content.mark:
            raise _lost(target) from None
    generations = [file.generation for file in files.list(content.folder)]
    try:
        _require_alone(base, target, generations)
        _require_wanted(given_up)
    except StoreError:
        files.remove(content.folder, target)
        raise
    for old in generations:
        if old <= target - GENERATIONS_KEPT:
            try:
                files.remove(content.folder, old)
            except Exception as error:  # the next write tries again
                logger.warning("%s: generation %d cannot be removed: %s", files.name, old, in_one_line(error))
    return target


def require_newest(base: int, generations: list[int]) -> None:
    """That one can go on from `base`, of the generations that are there, in order; 0: from nothing.

    Raises:
        Lost: when there is a newer one, or `base` is gone.
    """
    if generations and generations[-1] > base:
        raise _lost(generations[-1])
    if base and base not in generations:
        raise Lost(f"generation {base} is gone: it was forgotten.")


def _require_alone(base: int, target: int, generations: list[int]) -> None:
    """An old name can be created again once its file was removed: then there are newer ones, or `base` is gone.

    The one after `target` alone was made from it, by a server that the person has moved to.
    """
    newest = max(generations, default=target)
    if newest > target + 1:
        raise _lost(newest)
    if newest <= target and base and base not in generations:
        raise Lost(f"generation {base} is gone: it was forgotten.")


def _lost(generation: int) -> Lost:
    return Lost(f"somebody else has written generation {generation} of this person's memory.")


def _until(given_up: Callable[[], bool], pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        _require_wanted(given_up)
        yield piece


def _require_wanted(given_up: Callable[[], bool]) -> None:
    if given_up():
        raise StoreError("the write was given up.")
