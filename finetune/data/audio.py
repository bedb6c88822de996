"""Audio files, read by sphn: whatever is wrong with one is a ValueError or an OSError.

Shapes: `C` channels, `S` samples.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sphn

RATES = range(1_000, 1_000_001)
"""Samples per second that a file may claim; a damaged header that claims more would have sphn end the process."""


class AudioFile:
    """The header of an audio file; samples are read on demand.

    Attributes:
        channels: C.
        rate: samples per second.
        duration: seconds, as the header says; the file may end before, see `ends_early`.

    Raises:
        ValueError: for what is no audio, or cannot be.
    """

    def __init__(self, path: Path):
        with _no_panic(path):
            self._reader = sphn.FileReader(str(path))
        self.channels, self.rate = self._reader.channels, self._reader.sample_rate
        self.duration = self._reader.duration_sec
        if self.rate not in RATES:
            raise ValueError(f"{path}: {self.rate} samples per second")
        self._path = path

    def read(self, start: float, duration: float) -> np.ndarray:
        """Samples `[C, S]` float32 of `duration` seconds from `start` seconds on; fewer when the file ends before.

        Raises:
            ValueError: when `start` lies behind the end, or the samples are damaged.
        """
        with _no_panic(self._path):
            return self._reader.decode(start, duration)

    def ends_early(self) -> bool:
        """Whether the end that the header promises cannot be read, as in a file of which only a part was copied."""
        last = min(0.02, self.duration)
        try:
            return self.read(self.duration - last, last).shape[1] == 0
        except ValueError:
            return True


def durations(paths: Iterable[Path]) -> list[float | None]:
    """Seconds of each file, as its header says; None for one that is missing or no audio."""
    found: list[float | None] = []
    for path in paths:
        try:
            found.append(AudioFile(path).duration)
        except (OSError, ValueError):
            found.append(None)
    return found


@contextlib.contextmanager
def _no_panic(path: Path) -> Iterator[None]:
    """A panic in sphn's Rust comes as a BaseException, of a class that cannot be imported; here it is a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{path}: {error}") from error
