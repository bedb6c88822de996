"""Audio files as other programs leave them: samples of any size, headers that do not know the length, rare codecs."""

import struct
from pathlib import Path

import numpy as np

RATE = 24_000
UNKNOWN = 0xFFFF_FFFF
"""What a program writes as the length that it does not know yet."""


def noise(steps: float = 4, channels: int = 2, seed: int = 0, loudness: float = 0.1) -> np.ndarray:
    """Samples `[C, S]` float32 of so many steps of 80 ms."""
    shape = (channels, round(steps * 0.08 * RATE))
    return (np.random.default_rng(seed).standard_normal(shape) * loudness).astype("f")


def write_wav(
    path: Path, pcm: np.ndarray, *, data: int | None = None, riff: int | None = None, rate: int = RATE
) -> None:
    """`pcm [C, S]` as float32, which may hold anything; `data` and `riff` replace the lengths in the header."""
    body = np.ascontiguousarray(pcm.T, dtype="<f4").tobytes()
    channels = len(pcm)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 3, channels, rate, rate * channels * 4, channels * 4, 32)
    lengths = (36 + len(body) if riff is None else riff), (len(body) if data is None else data)
    start = struct.pack("<4sI4s", b"RIFF", lengths[0], b"WAVE")
    path.write_bytes(start + form + struct.pack("<4sI", b"data", lengths[1]) + body)


def write_adpcm(path: Path, seconds: float) -> None:
    """A stereo WAV in IMA ADPCM, which decoders cannot read from the middle."""
    block = 1024
    samples = (block - 8) + 1
    number = int(seconds * RATE / samples) + 1
    nibbles = np.random.default_rng(0).integers(0, 256, (number, block), dtype=np.uint8)
    nibbles[:, :8] = 0  # where each block begins, per channel: a sample, and the size of a step
    body = nibbles.tobytes()
    form = struct.pack("<4sIHHIIHHHH", b"fmt ", 20, 0x11, 2, RATE, RATE * block // samples, block, 4, 2, samples)
    fact = struct.pack("<4sII", b"fact", 4, number * samples)
    content = b"WAVE" + form + fact + struct.pack("<4sI", b"data", len(body)) + body
    path.write_bytes(struct.pack("<4sI", b"RIFF", len(content)) + content)


def write_endless_flac(path: Path) -> None:
    """The header of a stereo FLAC that was written to a pipe: it has no number of samples."""
    rate_channels_bits = RATE << 12 | (2 - 1) << 9 | (16 - 1) << 4
    info = struct.pack(">HH", 4096, 4096) + bytes(6) + rate_channels_bits.to_bytes(4, "big") + bytes(4) + bytes(16)
    path.write_bytes(b"fLaC" + bytes([0x80]) + len(info).to_bytes(3, "big") + info)
