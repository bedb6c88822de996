"""What is odd about samples that can be read: far too loud, silent where words are spoken, the same on both channels.

Shapes: `C` channels, `S` samples.
"""

from collections.abc import Iterable

import numpy as np

from .manifest import Alignment
from .text_row import MAIN_SPEAKER

MAX_LOUDNESS = 2.0
"""A sample this far outside of [-1, 1] was not scaled to it; decoders of compressed files overshoot far less."""

SILENCE_LEVEL = 1e-3
"""What is quieter, -60 dB, is no speech."""

MAX_SILENT_SHARE = 0.2
"""So large a share of a channel's words may be silent: alignments are not exact."""

SAME_DIFFERENCE = 0.01
"""Channels that differ by less than this share of the loudest sample are one recording twice."""

WINDOWS_PER_SECOND = 100
"""Stretches per second of which the loudest sample is kept."""

WORD_MARGIN = 0.1
"""Seconds around a word in which it may be heard."""

LOUD, ONE_CHANNEL, SILENT_WORDS = "samples outside of [-1, 1]", "both channels are the same", "words without a sound"


class SoundMeter:
    """Measures samples part by part, in their order.

    Args:
        rate: samples per second.
        start: seconds of the file before the first part.

    Attributes:
        rate: as given.
        samples: S, of all parts.
    """

    def __init__(self, rate: int, start: float = 0.0):
        self.rate, self._start, self.samples = rate, start, 0
        self._difference = 0.0
        self._loudest: list[np.ndarray] = []

    @property
    def seconds(self) -> float:
        """How long all parts are."""
        return self.samples / self.rate

    def add(self, pcm: np.ndarray) -> None:
        """The next part, `[C, S]`; but for the last, of whole seconds."""
        if not pcm.shape[1]:
            return
        self.samples += pcm.shape[1]
        windows = np.arange(0, pcm.shape[1] * WINDOWS_PER_SECOND / self.rate)
        first = np.minimum(windows * self.rate / WINDOWS_PER_SECOND, pcm.shape[1] - 1).astype(int)
        self._loudest.append(np.maximum.reduceat(np.abs(pcm), first, axis=1))
        if len(pcm) == 2:
            self._difference = max(self._difference, float(np.abs(pcm[0] - pcm[1]).max()))

    def faults(self, alignments: Iterable[Alignment]) -> dict[str, str]:
        """Each kind of fault that was found, with its numbers.

        Args:
            alignments: words that are spoken in the file; those outside of what was measured are left out.
        """
        if not self.samples:
            return {}
        loudest = np.concatenate(self._loudest, axis=1)
        peak, found = float(loudest.max()), {}
        if peak > MAX_LOUDNESS:
            found[LOUD] = f"samples up to {peak:.3g}; must be between -1 and 1"
        if len(loudest) != 2:
            return found
        if peak > SILENCE_LEVEL and self._difference <= SAME_DIFFERENCE * peak:
            found[ONE_CHANNEL] = "both channels are the same; left must be Moshi, right the user"
        silent = [self._silent_words(loudest, side, alignments) for side in (0, 1)]
        said = [text for text in silent if text is not None]
        if said:
            found[SILENT_WORDS] = "; ".join(said)
        return found

    def _silent_words(self, loudest: np.ndarray, side: int, alignments: Iterable[Alignment]) -> str | None:
        """In words, that too many of the words of one side are not heard on its channel."""
        words = silent = 0
        for _, (start, end), speaker in alignments:
            if (speaker == MAIN_SPEAKER) != (side == 0) or not start < end:
                continue
            if not 0 <= (start - self._start) * WINDOWS_PER_SECOND < loudest.shape[1]:
                continue
            around = (start - self._start - WORD_MARGIN, end - self._start + WORD_MARGIN)
            first, last = (round(min(max(at * WINDOWS_PER_SECOND, 0), loudest.shape[1])) for at in around)
            words += 1
            silent += not (loudest[side, first : last + 1] > SILENCE_LEVEL).any()
        if silent <= MAX_SILENT_SHARE * words:
            return None
        channel, by = ("left", MAIN_SPEAKER) if side == 0 else ("right", "other speakers")
        return f"{silent} of {words} words by {by} are spoken while the {channel} channel is silent"
