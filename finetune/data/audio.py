"""Audio files, read by sphn: whatever is wrong with one is a ValueError, in words without its name, or an OSError.

Shapes: `C` channels, `S` samples.
"""

import contextlib
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import sphn

from .headers import doubtful_length

PLAUSIBLE_RATES = range(1_000, 1_000_001)
"""Samples per second that a file may claim; a damaged header that claims more would have sphn end the process."""

MAX_SAMPLE = 2.0**32
"""A larger value is no sound, at whatever scale samples were written; Mimi would answer it with NaN."""

BLOCK_SAMPLES = 1 << 22
"""A whole file is read in blocks of so many samples of each channel, about three minutes at 24 kHz."""

CUT_OFF_SECONDS = 0.1
"""A file that ends so much earlier than its header says was not copied whole; compressed ones may end a little so."""

PROBE_SECONDS = 0.2
"""How much is read to find out whether a file can be read from the middle."""


class AudioFile:
    """The header of an audio file; samples are read on demand.

    Attributes:
        channels: C.
        rate: samples per second.
        duration: seconds, as the header says, or as the size says where the header does not know it. The file may end
            before.
        doubt: why the header's length is not to be trusted; None when it is.

    Raises:
        ValueError: for what is no audio, or cannot be.
        OSError: when there is no such file.
    """

    def __init__(self, path: Path):
        self._path = path
        self.doubt = doubtful_length(path)
        try:
            with _no_panic():
                self._reader = sphn.FileReader(str(path))
        except ValueError as error:
            raise ValueError(self._why_unreadable(error)) from error
        self.channels, self.rate = self._reader.channels, self._reader.sample_rate
        self.duration = self._reader.duration_sec
        if self.doubt is not None and self.doubt.seconds is not None:
            self.duration = self.doubt.seconds
        if self.rate not in PLAUSIBLE_RATES:
            raise ValueError(f"{self.rate} samples per second")

    def read(self, start: float, duration: float) -> np.ndarray:
        """Samples `[C, S]` float32 of `duration` seconds from `start` seconds on; fewer when the file ends before.

        Raises:
            ValueError: when nothing can be read there, or samples are damaged, not finite or no sound.
        """
        try:
            with _no_panic():
                pcm = self._reader.decode(start, duration)
        except ValueError as error:
            reason = f" ({_in_short(error, self._path)})" if start <= self.duration else ""
            raise ValueError(self.why_nothing(start) + reason) from error
        low, high = (pcm.min(), pcm.max()) if pcm.size else (0.0, 0.0)
        if not (np.isfinite(low) and np.isfinite(high)):
            first = start + np.argmin(np.isfinite(pcm).all(0)) / self.rate
            raise ValueError(f"samples that are not finite, the first after {first:.3f} s")
        if max(-low, high) > MAX_SAMPLE:
            raise ValueError(f"samples up to {max(-low, high):.3g}, which are no sound; must be between -1 and 1")
        return pcm

    def blocks(self) -> Iterator[np.ndarray]:
        """All samples, in parts `[C, S]` of whole seconds up to where they end.

        Raises:
            ValueError: as `read`.
        """
        start, seconds = 0.0, float(max(BLOCK_SAMPLES // self.rate, 1))
        while True:
            try:
                pcm = self.read(start, seconds)
            except ValueError:
                if start == 0 or start < self.duration - CUT_OFF_SECONDS:
                    raise
                return
            yield pcm
            if pcm.shape[1] < (seconds - CUT_OFF_SECONDS) * self.rate:
                return
            start += seconds

    def is_cut_off(self, seconds: float) -> bool:
        """Whether a file that ends after `seconds` ends before its header says, where the header knows it."""
        return self.doubt is None and seconds < self.duration - CUT_OFF_SECONDS

    def can_seek(self) -> bool:
        """Whether this file can be read from the middle; some codecs can be read from the start alone."""
        if self._samples(0.0, PROBE_SECONDS) < PROBE_SECONDS * self.rate:
            return True  # too short to tell, and to need it; or damaged
        return self._samples(PROBE_SECONDS / 2, PROBE_SECONDS / 4) > 0

    def _samples(self, start: float, duration: float) -> int:
        """How many can be read there."""
        try:
            with _no_panic():
                return self._reader.decode(start, duration).shape[1]
        except ValueError:
            return 0

    def why_nothing(self, start: float) -> str:
        """In words, why no sample is read from `start` seconds on."""
        if not self.can_seek():
            return f"this codec cannot be read from the middle; {self.remedy}"
        nothing = f"no audio from {start:g} s on"
        if self.doubt is not None:
            remedy = self.remedy if self.doubt.hides else "list the seconds that it plays"
            return f"{nothing}; {self.doubt.reason}; {remedy}"
        if start < self.duration - CUT_OFF_SECONDS:
            return f"{nothing}, though its header says {self.duration:.3f} s: cut off, or damaged; copy it anew"
        return f"{nothing}: the file has {self.duration:.3f} s; is the list's duration too long?"

    @property
    def remedy(self) -> str:
        """What to do with a file in a format that cannot be used."""
        return f"convert it, for example with `ffmpeg -i {shlex.quote(self._path.name)} new.wav`"

    def _why_unreadable(self, error: ValueError) -> str:
        if self.doubt is not None:
            return f"{self.doubt.reason}; {self.remedy}"
        reason = _in_short(error, self._path)
        if reason == "no n-frames":
            reason = "its header does not say how long it is, as when it was written to a pipe, or is a part of a file"
        return f"cannot be read ({reason}); {self.remedy}"


def durations(paths: Iterable[Path]) -> list[float | None]:
    """Seconds of each file, as its header or its size says; None for one that is missing or no audio."""
    found: list[float | None] = []
    for path in paths:
        try:
            found.append(AudioFile(path).duration)
        except (OSError, ValueError):
            found.append(None)
    return found


def _in_short(error: ValueError, path: Path) -> str:
    """What sphn says, without the name of the file."""
    return str(error).removeprefix(f'"{path}": ')


@contextlib.contextmanager
def _no_panic() -> Iterator[None]:
    """A panic in sphn's Rust comes as a BaseException, of a class that cannot be imported; here it is a ValueError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(str(error)) from error
