"""The text row of a training item: each word's tokens from the step in which the word starts.

Shapes: `T` steps of 80 ms.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch

from .manifest import Alignment

MAIN_SPEAKER = "SPEAKER_MAIN"
"""Whose words are written: Moshi's, on the left channel."""


ROUNDING = 1e-6
"""Steps by which a start that is a step's own may fall short of it: 2.32 * 12.5 is 28.999999999999996, and step 29."""

FAR = 1e15
"""Steps: farther from the start, a time is as good as infinite."""


class TextTokenizer(Protocol):
    """What is used of a `sentencepiece.SentencePieceProcessor`."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: list[int]) -> str: ...

    def get_piece_size(self) -> int: ...


class Placement(NamedTuple):
    """Where a word is written: from `step` on, as many of its `tokens` as there is `room` for, which may be none."""

    word: str
    step: int
    tokens: list[int]
    room: int


def place_words(
    alignments: Iterable[Alignment],
    tokenizer: TextTokenizer,
    steps: int,
    *,
    first_step: int = 0,
    frame_rate: float = 12.5,
    main_speaker: str = MAIN_SPEAKER,
) -> list[Placement]:
    """The words of `main_speaker` that start within `steps` steps from `first_step` on, in the order of their starts.

    A word has room until the next one starts, or the steps end. Left out are words of non-positive duration.
    """
    words = sorted(
        ((start, word) for word, (start, end), speaker in alignments if speaker == main_speaker and start < end),
        key=lambda item: item[0],
    )
    starts = [math.floor(min(max(start * frame_rate + ROUNDING, -FAR), FAR)) - first_step for start, _ in words]
    return [
        Placement(word.strip(), start, tokenizer.encode(word.strip()), min(limit, steps) - start)
        for (_, word), (start, limit) in zip(words, pairwise([*starts, steps]), strict=True)
        if 0 <= start < steps
    ]


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
    where = {"first_step": first_step, "frame_rate": frame_rate, "main_speaker": main_speaker}
    for _, start, tokens, room in place_words(alignments, tokenizer, steps, **where):
        placed = tokens[:room]
        row[start : start + len(placed)] = placed
        if placed and start > 0 and row[start - 1] == padding_id:
            row[start - 1] = end_padding_id
    return torch.tensor([row], dtype=torch.int64)
