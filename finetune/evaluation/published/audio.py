"""From a mono file to the codes of a stream in which Moshi says it, alone.

Shapes: `K` = 1 + n_q rows, `T` steps, `S` samples.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...common.errors import ConfigError
from ...data.audio import CUT_OFF_SECONDS, AudioFile
from ...data.broken import BrokenItem
from ...data.encode import check_codebooks, encode_channels
from ...data.resample import is_enough, resample


class MonoTokenizer:
    """Turns audio files into codes: the speech on Moshi's channel, silence on the user's, padding as text.

    A likelihood is one of what the model itself says, and the model predicts its own channel alone. Nobody else speaks:
    the user's rows are Mimi's codes of digital silence. There is no transcript: the text row is padding.

    After the speech there are as many steps of zero tokens as the model's largest delay, which carry no loss: without
    them the last codes of the delayed rows would be left out, and a code would count or not by what comes after it.

    Args:
        mimi: a `MimiModel`, not streaming, with at least as many codebooks as either channel needs.
        n_q, dep_q, delays, padding_id, zero_id: of the language model.

    Raises:
        ConfigError: for a model that predicts no audio, or a Mimi with too few codebooks.
    """

    def __init__(self, mimi: Any, *, n_q: int, dep_q: int, delays: list[int], padding_id: int, zero_id: int):
        if dep_q < 1:
            raise ConfigError(f"dep_q={dep_q}: the model predicts no audio, so no recording has a likelihood.")
        check_codebooks(mimi, n_q, dep_q)
        self.mimi, self.n_q, self.dep_q = mimi, n_q, dep_q
        self.tail = max(delays[: 1 + dep_q])
        self.padding_id, self.zero_id = padding_id, zero_id

    @classmethod
    def for_model(cls, model: Any, mimi: Any) -> "MonoTokenizer":
        """With the codebooks, the delays and the special tokens of an `LMModel`."""
        return cls(
            mimi,
            n_q=model.n_q,
            dep_q=model.dep_q,
            delays=model.delays,
            padding_id=model.text_padding_token_id,
            zero_id=model.zero_token_id,
        )

    def steps(self, seconds: float) -> int:
        """Steps of that many seconds of audio, without the tail."""
        return math.ceil(seconds * self.mimi.frame_rate - 1e-6)

    def __call__(self, path: Path, max_seconds: float | None = None) -> torch.Tensor:
        """Codes `[1, K, T + tail]` int64 on the CPU of the file, or of its first `max_seconds`.

        Raises:
            BrokenItem: for a file that is missing, empty, cut off, cannot be read or is not mono.
        """
        return self.codes(read_mono(path, self.mimi.sample_rate, max_seconds))

    def codes(self, pcm: np.ndarray) -> torch.Tensor:
        """The same of samples `[S]` float32 at Mimi's rate."""
        audio = encode_channels(self.mimi, np.stack([pcm, np.zeros_like(pcm)]), self.n_q, self.dep_q)
        steps = audio.shape[1]
        codes = torch.full((1, 1 + self.n_q, steps + self.tail), self.zero_id)
        codes[0, 0, :steps] = self.padding_id
        codes[0, 1:, :steps] = audio
        return codes


def read_mono(path: Path, sample_rate: int, max_seconds: float | None = None) -> np.ndarray:
    """Samples `[S]` float32 at `sample_rate`: the file's, or its first `max_seconds`; never more is in memory.

    Raises:
        BrokenItem: for a file that is missing, empty, cut off, cannot be read, is not mono, or no sound.
    """
    try:
        audio = AudioFile(path)
        pcm = audio.read(0.0, audio.duration + 1 if max_seconds is None else max_seconds)  # durations are rounded
    except (OSError, ValueError) as error:
        raise BrokenItem(f"{path}: {error}") from error
    if pcm.shape[0] != 1:
        raise BrokenItem(f"{path}: {pcm.shape[0]} channels; must be one, that of the speaker.")
    if not is_enough(pcm.shape[1], audio.rate, sample_rate):
        raise BrokenItem(f"{path}: {audio.why_nothing(0.0)}")
    heard = pcm.shape[1] / audio.rate
    if audio.is_cut_off(heard) and heard < (max_seconds or math.inf) - CUT_OFF_SECONDS:
        raise BrokenItem(f"{path}: cut off after {heard:.2f} s of {audio.duration:.2f} s.")
    return resample(pcm, audio.rate, sample_rate)[0]
