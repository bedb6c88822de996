"""What the header of an audio file says about its length, read without a decoder: not every header knows it."""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

UNKNOWN_LENGTHS = (range(0x7FFF_F000, 0x8000_0000), range(0xFFFF_F000, 0x1_0000_0000))
"""Bytes of audio that programs write into a WAV header before they know them; at the end of a pipe they stay."""

EQUAL_SAMPLES = (1, 3, 6, 7, 0xFFFE)
"""Formats of a WAV file whose samples all take the same bytes: numbers, floats, A-law, mu-law, and an extension."""

MAX_CHUNKS = 1000
"""So many chunks of a WAV file are looked at; before the audio there are few."""

MP3_TABLES = (b"Xing", b"Info", b"VBRI")
"""Names of the table in the first frame of an MP3 that says how long it is."""


@dataclass(frozen=True)
class DoubtfulLength:
    """Why the length in a header is not the file's.

    Attributes:
        reason: in words, the end of a sentence that begins with the name of the file.
        seconds: the length as far as the size of the file tells it.
        hides: whether the header ends the audio before the file does, so that the rest cannot be heard.
    """

    reason: str
    seconds: float | None = None
    hides: bool = False


def doubtful_length(path: Path) -> DoubtfulLength | None:
    """What is wrong with the length in the header of `path`; None when a decoder can go by it, or for other formats."""
    with path.open("rb") as file:
        start = file.read(12)
        if start[:4] in (b"RIFF", b"RIFX") and start[8:] == b"WAVE":
            return _wav(file) if start[:4] == b"RIFF" else None
        if start[:4] == b"fLaC":
            return _flac(file)
        if start[:3] == b"ID3" or (start[:1] == b"\xff" and start[1] >= 0xE0 and start[1] & 0x06):
            return _mp3(file, start)
    return None


def _wav(file: BinaryIO) -> DoubtfulLength | None:
    """Of a WAV file whose data chunk has another length than what follows it."""
    size = os.fstat(file.fileno()).st_size
    rate, frame_bytes = 0, 0
    for name, length, at in _chunks(file, size):
        if name == b"fmt " and length >= 16:
            kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", file.read(16).ljust(16, b"\0"))
            frame_bytes = channels * bits // 8 if kind in EQUAL_SAMPLES else 0
        if name != b"data":
            continue
        available = size - at
        streamed = length > available and any(length in lengths for lengths in UNKNOWN_LENGTHS)
        hidden = length < available and not _is_chunk(file, at + length + length % 2, size)
        if not (streamed or hidden):
            return None
        seconds = available // frame_bytes / rate if streamed and frame_bytes and rate else None
        numbers = f"says {length} bytes of audio, and {available} follow"
        return DoubtfulLength(f"its WAV header {numbers}, as when it was written to a pipe", seconds, hidden)
    return None


def _chunks(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, length and place of the first chunks of a WAV file, the file being at that place."""
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > size:
            return
        file.seek(at)
        name, length = struct.unpack("<4sI", file.read(8))
        yield name, length, at + 8
        at += 8 + length + length % 2


def _is_chunk(file: BinaryIO, at: int, size: int) -> bool:
    """Whether another chunk begins at `at`, or nothing worth mentioning is there."""
    if size - at < 8:
        return True
    file.seek(at)
    name, length = struct.unpack("<4sI", file.read(8))
    return all(32 <= byte < 127 for byte in name) and at + 8 + length <= size + 1


def _flac(file: BinaryIO) -> DoubtfulLength | None:
    """Of a FLAC file whose first block, which has 36 bits for the number of samples, says 0."""
    file.seek(21)
    number = file.read(5)
    if len(number) < 5 or number[0] & 0x0F or any(number[1:]):
        return None
    return DoubtfulLength("its FLAC header does not say how long it is, as when it was written to a pipe")


def _mp3(file: BinaryIO, start: bytes) -> DoubtfulLength | None:
    """Of an MP3 file without a table of its length: a decoder estimates it from the first frames."""
    tags = 0
    if start[:3] == b"ID3":
        tags = 10 + sum((byte & 0x7F) << shift for byte, shift in zip(start[6:10], (21, 14, 7, 0), strict=True))
    file.seek(tags)
    frame = file.read(4096)
    if any(name in frame for name in MP3_TABLES):
        return None
    return DoubtfulLength("its MP3 header does not say how long it is, and decoders estimate it")
