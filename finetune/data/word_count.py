"""What becomes of words on their way to the text row: how many are Moshi's, how many are placed, and why others not."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

from .manifest import Alignment, in_short, shown
from .text_row import MAIN_SPEAKER, place_words

MIN_MAIN_SHARE = 0.01
"""When a smaller share of all words is Moshi's, their speaker is most likely called otherwise."""

MIN_PLACED_SHARE = 0.1
"""When a smaller share of Moshi's words gets into the text row, there is nothing to learn to say."""

GOOD_PLACED_SHARE = 0.9
"""When a smaller share does, it is worth a warning. Two words within 80 ms, of which one is lost, are rare."""


class _OnePiece:
    """Stands for a tokenizer that is not there: knows every word, as one piece."""

    def unk_id(self) -> int:
        return -1

    def encode(self, text: str) -> list[int]:
        return [-2] if text else []


class WordCount:
    """Counts the words of transcripts, and what becomes of those of `MAIN_SPEAKER`.

    Args:
        tokenizer: a sentencepiece processor; None: every word is taken to be known.
        frame_rate: steps per second.
        special_ids: ids that are no words, those of padding and of its end.

    Attributes:
        transcripts, words: of all speakers.
        speakers: words by each.
        placed: words whose first piece gets into the text row, all pieces being known.
        unknown: words with a piece that the tokenizer does not know, or that is padding.
        outside: words that start before 0 or after the end of the audio.
        empty: words without a duration.
        crowded: words in whose step the next one starts.
        strangest: the first unknown words.
    """

    def __init__(self, tokenizer: Any, frame_rate: float, special_ids: Iterable[int]):
        self._tokenizer, self._frame_rate = tokenizer or _OnePiece(), frame_rate
        self._not_words = {self._tokenizer.unk_id(), *special_ids}
        self.transcripts = self.words = self.placed = self.unknown = self.outside = self.empty = self.crowded = 0
        self.speakers: Counter[str] = Counter()
        self.strangest: list[str] = []

    def add(self, alignments: list[Alignment], seconds: float) -> None:
        """Counts the words of one transcript, of a file of so many seconds."""
        self.transcripts += 1
        self.words += len(alignments)
        self.speakers.update(speaker for _, _, speaker in alignments)
        steps = math.ceil(seconds * self._frame_rate - 1e-3)
        main = [word for word in alignments if word[2] == MAIN_SPEAKER]
        self.empty += sum(start >= end for _, (start, end), _ in main)
        placements = place_words(main, self._tokenizer, steps, frame_rate=self._frame_rate)
        self.outside += sum(start < end for _, (start, end), _ in main) - len(placements)
        for word, _, tokens, room in placements:
            if not tokens or self._not_words.intersection(tokens):
                self.unknown += 1
                self.strangest = [*self.strangest, word][:3]
            elif room > 0:
                self.placed += 1
            else:
                self.crowded += 1

    @property
    def main(self) -> int:
        """Words by `MAIN_SPEAKER`."""
        return self.speakers[MAIN_SPEAKER]

    @property
    def _meant(self) -> int:
        """Those of them that are to become text: words without a duration are dropped as it is meant to be."""
        return self.main - self.empty

    def refusal(self) -> str | None:
        """Why these transcripts cannot be trained on, in words; None when they can."""
        if not self.words:
            return f"no words in {self.transcripts} transcripts: Moshi would learn to say nothing"
        if self.main < MIN_MAIN_SHARE * self.words:
            named = shown(f"{name} ({number})" for name, number in self.speakers.most_common())
            return (
                f"{self.main} of {self.words} words are by {MAIN_SPEAKER}, and only those become text; call Moshi's "
                f"speaker {MAIN_SPEAKER}. Speakers found: {named}"
            )
        if self.placed == 0 or self.placed < MIN_PLACED_SHARE * self._meant:
            return f"hardly any word becomes text: {self.summary()}"
        return None

    def warning(self) -> str | None:
        """That a large share of Moshi's words is lost, in words; None when it is not, or training is refused."""
        if self.refusal() is None and self.placed < GOOD_PLACED_SHARE * self._meant:
            return f"many words are lost: {self.summary()}"
        return None

    def summary(self) -> str:
        """The numbers in words, with the most likely cause."""
        lost = {
            "are unknown to the tokenizer": self.unknown,
            "start outside of the audio": self.outside,
            "have no duration": self.empty,
            "start in the same step of 80 ms as the next one": self.crowded,
        }
        parts = [f"{self.placed} are placed", *(f"{number} {what}" for what, number in lost.items() if number)]
        text = f"of {self.main} words by {MAIN_SPEAKER} in {self.transcripts} transcripts {', '.join(parts)}"
        if self.unknown:
            text += f"; the first unknown: {', '.join(in_short(word, 40) for word in self.strangest)}"
        if 2 * self.outside > self._meant > 0:
            text += "; times must be in seconds, are these in milliseconds?"
        return text
