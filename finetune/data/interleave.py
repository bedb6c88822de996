"""The text row of a training item: each word's tokens from the step in which the word starts.

Shapes: `T` steps of 80 ms.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Protocol

import torch

from .manifest import Alignment

MAIN_SPEAKER = "SPEAKER_MAIN"
"""Whose words are written: Moshi's, on the left channel."""


class TextTokenizer(Protocol):
    """What is used of a `sentencepiece.SentencePieceProcessor`."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def get_piece_size(self) -> int: ...


def text_row(
    alignments: Iterable[Alignment],
    tokenizer: TextTokenizer,
    steps: int,
    *,
    first_step: int = 0,
    frame_rate: float = 12.5,
    padding_id: int = 3,
    end_padding_id: int = 0,
    main_speaker: str = MAIN_SPEAKER,
) -> torch.Tensor:
    """Text tokens `[1, T]` int64 for the `steps` steps of a file from `first_step` on.

    Padding everywhere, but a word's tokens one per step from the step that its start falls in; those not placed when
    the next word starts are dropped. The step before a word holds `end_padding_id` if it was padding. Left out are
    words of other speakers, words of non-positive duration and words that start outside of the steps asked for.

    Args:
        alignments: in any order, in seconds since the start of the file.
        steps: T.
        first_step: where the segment starts in its file. Steps are counted from the start of the file and only then
            made relative, so that a word falls in the same step wherever the file is cut.
    """
    row = [padding_id] * steps
    words = sorted(
        ((start, word) for word, (start, end), speaker in alignments if speaker == main_speaker and start < end),
        key=lambda item: item[0],
    )
    starts = [math.floor(start * frame_rate) - first_step for start, _ in words]
    for (_, word), (start, limit) in zip(words, pairwise([*starts, steps]), strict=True):
        if not 0 <= start < steps:
            continue
        tokens = tokenizer.encode(word.strip())[: min(limit, steps) - start]
        row[start : start + len(tokens)] = tokens
        if tokens and start > 0 and row[start - 1] == padding_id:
            row[start - 1] = end_padding_id
    return torch.tensor([row], dtype=torch.int64)
