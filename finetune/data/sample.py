"""Looks at a sample of a dataset as a run starts: do its words become text, and is there sound where words are?

All of a dataset is looked at by `python -m finetune.data check`; here the work is bounded, however large it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .audio import AudioFile
from .manifest import Alignment, scan_transcript, transcript_path
from .segments import Cutter, Listing, Segment
from .sound import SoundMeter
from .word_count import WordCount

T = TypeVar("T")

MAX_TRANSCRIPTS = 200
"""So many of each source are counted, evenly spread over its lists."""

MAX_SEGMENTS = 32
"""So many of each source are listened to, evenly spread."""

MAX_SECONDS = 30.0
"""How much of such a segment is listened to."""


@dataclass
class Sampled:
    """What a sample shows, in words.

    Attributes:
        refusals: why a source cannot be trained on.
        warnings: what is odd about it.
    """

    refusals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def look_at_sample(listing: Listing, cutter: Cutter, text_tokenizer: Any, padding_ids: Iterable[int]) -> Sampled:
    """Counts the words of some transcripts of each source, and listens to some of its segments.

    What is broken is left out: it is counted when it is read.

    Args:
        cutter: that made the listing.
        text_tokenizer: a sentencepiece processor.
        padding_ids: as `text_tokenizer.padding_ids` returns them.
    """
    found, padding_ids = Sampled(), tuple(padding_ids)
    for source, entries, segments in zip(listing.sources, listing.entries, listing.segments, strict=True):
        words = WordCount(text_tokenizer, cutter.frame_rate, padding_ids)
        for entry in _spread(list({entry.path: entry for entry in entries}.values()), MAX_TRANSCRIPTS):
            alignments = _words(entry.path)
            if alignments is not None:
                words.add(alignments, entry.duration)
        refusal, warning = words.refusal(), words.warning()
        found.refusals += [f"{source.name}: {refusal}"] if refusal and words.transcripts else []
        found.warnings += [f"{source.name}: {warning}"] if warning else []
        found.warnings += [f"{source.name}: {text}" for text in _listen(_spread(segments, MAX_SEGMENTS), cutter)]
    return found


def _listen(segments: list[Segment], cutter: Cutter) -> list[str]:
    """In words, how many of the segments have each fault, and which is the first."""
    faults: dict[str, list[str]] = {}
    heard = 0
    for segment in segments:
        start = segment.first_step / cutter.frame_rate
        try:
            audio = AudioFile(segment.path)
            pcm = audio.read(start, min(cutter.steps / cutter.frame_rate, MAX_SECONDS))
        except (OSError, ValueError):
            continue
        meter = SoundMeter(audio.rate, start)
        meter.add(pcm)
        heard += 1
        for kind, message in meter.faults(_words(segment.path) or ()).items():
            faults.setdefault(kind, []).append(f"{segment}: {message}")
    return [
        f"{kind} in {len(messages)} of {heard} segments that were listened to. The first: {messages[0]}"
        for kind, messages in faults.items()
    ]


def _words(path: Path) -> list[Alignment] | None:
    """The words of an audio file; None when they cannot be read."""
    try:
        return list(scan_transcript(transcript_path(path))[0].values())
    except (OSError, ValueError):
        return None


def _spread(items: list[T], number: int) -> list[T]:
    """At most `number` of them, evenly spread, the first and the last among them."""
    if len(items) <= number:
        return items
    return [items[index] for index in np.linspace(0, len(items) - 1, number).round().astype(int)]
