"""The task `dialogue`: two people take turns, with pauses; one tells facts and asks for them later, the other answers.

The text row holds what is said, by whomever; the audio row says who speaks. A fact is `TELL key value`, a question
`ASK key`, and its answer the value. Everything else is chat: words that follow each other as a fixed table says.
Keys, values and words are different tokens. Turns lie at the same steps in all rows, what is said differs.

Shapes: `B` rows, `T` steps.
"""

import torch

from .settings import Settings
from .tasks import SILENCE, Batch

TELL, ASK = 1, 2
WORDS, KEYS, VALUES = 25, 36, 16
FIRST_WORD = 3
FIRST_KEY = FIRST_WORD + WORDS
FIRST_VALUE = FIRST_KEY + KEYS
CARD = FIRST_VALUE + VALUES
NOBODY, USER, MODEL = -1, 0, 1
FOLLOWS = torch.randint(WORDS, (WORDS, 3), generator=torch.Generator().manual_seed(0))
"""The words that may follow a word, equally likely."""

FACTS = 12
"""Facts of a training dialogue."""


class Script:
    """A dialogue that is written from its start to its end; what does not fit any more is left out.

    Attributes:
        text: `[B, T]`, int64; silence where nobody has spoken yet.
        speaker: `[T]`, int64: `USER`, `MODEL` or `NOBODY`.
        at: the next step.
    """

    def __init__(self, rows: int, length: int, generator: torch.Generator):
        self.generator = generator
        self.text = torch.full((rows, length), SILENCE)
        self.speaker = torch.full((length,), NOBODY)
        self.at = 0
        choices = torch.randint(3, (length, rows), generator=generator)
        chain = [torch.randint(WORDS, (rows,), generator=generator)]
        for choice in choices[1:]:
            chain.append(FOLLOWS[chain[-1], choice])
        self._chat = torch.stack(chain, 1) + FIRST_WORD
        self.keys = torch.rand(rows, KEYS, generator=generator).argsort(1) + FIRST_KEY
        self.values = torch.randint(VALUES, (rows, KEYS), generator=generator) + FIRST_VALUE

    @property
    def left(self) -> int:
        """Steps that are not written yet."""
        return self.text.shape[1] - self.at

    def number(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def pause(self, steps: int) -> None:
        """Nobody speaks."""
        self.at += min(steps, self.left)

    def chat(self, words: int, speaker: int) -> None:
        """One side speaks and says nothing that is asked for later."""
        words = min(words, self.left)
        self._say(self._chat[:, self.at : self.at + words], speaker)

    def tell(self, fact: int) -> int:
        """The user tells a fact. Returns the step of its value, or that of the end where it did not fit."""
        return self._fact(TELL, fact, USER)

    def ask(self, fact: int) -> int:
        """The user asks, the model answers. Returns the step of the answer, or that of the end."""
        return self._fact(ASK, fact, MODEL)

    def _fact(self, mark: int, fact: int, answers: int) -> int:
        if self.left < 3:
            self.at = self.text.shape[1]
            return self.at
        self._say(torch.stack([torch.full_like(self.keys[:, fact], mark), self.keys[:, fact]], 1), USER)
        self._say(self.values[:, fact, None], answers)
        return self.at - 1

    def _say(self, tokens: torch.Tensor, speaker: int) -> None:
        end = self.at + tokens.shape[1]
        self.text[:, self.at : end] = tokens
        self.speaker[self.at : end] = speaker
        self.at = end


def codes_of(text: torch.Tensor, speaker: torch.Tensor) -> torch.Tensor:
    """`[B, 2, T]`: the text row and the audio row of who speaks; -1 is moshi's zero token."""
    return torch.stack([text, speaker.expand_as(text)], 1)


def dialogue(settings: Settings, batch: int, generator: torch.Generator) -> Batch:
    """A training dialogue of `settings.length` steps. Facts are told, and asked for again and again.

    Marks: `first` are values when they are told, `within` and `beyond` answers whose value was last said within the
    attention window of one layer, or beyond what all layers reach.
    """
    script = Script(batch, settings.length, generator)
    said: dict[int, int] = {}
    marks = {name: torch.zeros(settings.length, dtype=torch.bool) for name in ("first", "within", "beyond")}
    while script.left:
        script.pause(script.number(1, 8) if script.number(0, 4) else script.number(9, 48))
        if script.number(0, 1):
            script.chat(script.number(2, 8), script.number(USER, MODEL))
        new = len(said) < FACTS and (not said or script.number(0, 1))
        fact = len(said) if new else list(said)[script.number(0, len(said) - 1)]
        step = script.tell(fact) if new else script.ask(fact)
        if step == settings.length:
            break
        distance = step - said.get(fact, step)
        if new:
            marks["first"][step] = True
        elif distance <= settings.window:
            marks["within"][step] = True
        elif distance > settings.reach:
            marks["beyond"][step] = True
        said[fact] = step
    text = script.text
    return Batch(codes_of(text, script.speaker), {name: mark.expand_as(text) for name, mark in marks.items()})
