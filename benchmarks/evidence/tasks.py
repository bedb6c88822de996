"""Draws the sequences of the synthetic tasks, and marks which step can be predicted in which way.

A *mark* names steps whose token can be known in one way only:

- `first`: it was never there before, so chance is the best there is;
- `within`: it returns within the attention window;
- `beyond`: it returns where the attention layers together no longer reach: memory is the only way.

Shapes: `B` rows, `R` rows of codes (text, then audio), `T` steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .settings import Settings

SILENCE = 0
"""The token that stands for silence."""

BLOCK = 8
"""Tokens of `local` that are said twice in a row."""


class Batch(NamedTuple):
    """Sequences, and marks that say what a step tests.

    Attributes:
        codes: `[B, R, T]`, int64.
        marks: name to `[B, T]`, bool: the steps whose token belongs to that mark.
    """

    codes: torch.Tensor
    marks: dict[str, torch.Tensor]


def _draw(high: int, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randint(high, shape, generator=generator)


def _distinct(high: int, count: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """`[batch, count]` numbers below `high`, no two of a row the same."""
    return torch.rand(batch, high, generator=generator).argsort(1)[:, :count]


def _with_audio(text: torch.Tensor, settings: Settings, generator: torch.Generator) -> torch.Tensor:
    shape = (len(text), settings.audio_rows, text.shape[1])
    audio = _draw(settings.card, shape, generator) if settings.audio == "random" else torch.full(shape, -1)
    return torch.cat([text[:, None], audio], 1)  # -1 is moshi's zero token: its embedding is zero


def _span(text: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    mark = torch.zeros_like(text, dtype=torch.bool)
    mark[:, start:stop] = True
    return mark


def recall(settings: Settings, batch: int, generator: torch.Generator, gap: int | None = None) -> Batch:
    """A part of random tokens, a gap that begins with `settings.echo` tokens and their echo, and the part again.

    The first token of the part and of the echo is left out: nothing says that it is about to come.

    Args:
        gap: steps between the part and its return; None draws one for the batch.
    """
    if gap is None:
        gap = int(_draw(settings.gap_max - settings.gap_min + 1, (), generator)) + settings.gap_min
    part = _draw(settings.card, (batch, settings.part), generator)
    filler = _draw(settings.card, (batch, gap), generator)
    echoed = min(settings.echo, gap // 2)
    filler[:, echoed : 2 * echoed] = filler[:, :echoed]
    silent = torch.arange(batch) < round(settings.quiet * batch)
    filler[silent] = SILENCE
    text = torch.cat([part, filler, part], 1)
    start, returned = settings.part, settings.part + gap
    marks = {
        "first": _span(text, 1, start),
        "within": _span(text, start + echoed + 1, start + 2 * echoed) & ~silent[:, None],
        "beyond": _span(text, returned + 1, returned + settings.part),
    }
    codes = _with_audio(text, settings, generator)
    if not settings.returns:
        codes[:, 0, returned:] = _draw(settings.card, (batch, settings.part), generator)
    return Batch(codes, marks)


def local(settings: Settings, batch: int, generator: torch.Generator, gap: int | None = None) -> Batch:
    """What a model can learn with attention alone: random tokens, each eight of them said twice in a row."""
    blocks = _draw(settings.card, (batch, 7, BLOCK), generator)
    text = torch.stack([blocks, blocks], 2).flatten(1)
    place = torch.arange(text.shape[1]).expand(batch, -1) % (2 * BLOCK)
    marks = {"first": (place > 0) & (place < BLOCK), "within": place > BLOCK}
    return Batch(_with_audio(text, settings, generator), marks)


def assoc(settings: Settings, batch: int, generator: torch.Generator, pairs: int | None = None) -> Batch:
    """Key-value pairs stated once; two more pairs, asked at once; filler; then every key again, in another order.

    A quarter of the vocabulary is filler, the rest is half keys and half values. No key occurs twice in a statement.

    Args:
        pairs: stated pairs; None draws one of `settings.pairs` for the batch.
    """
    if pairs is None:
        pairs = settings.pairs[int(_draw(len(settings.pairs), (), generator))]
    keys = values = 3 * settings.card // 8
    near = 2
    key = _distinct(keys, pairs + near, batch, generator)
    value = keys + _draw(values, (batch, pairs + near), generator)
    both = torch.stack([key, value], 2)
    stated, short = both[:, :pairs], both[:, pairs:]
    order = torch.rand(batch, pairs, generator=generator).argsort(1)
    asked = stated.gather(1, order[..., None].expand(-1, -1, 2))
    filler = keys + values + _draw(settings.card - keys - values, (batch, settings.reach), generator)
    text = torch.cat([*(x.flatten(1) for x in (stated, short, short)), filler, asked.flatten(1)], 1)
    odd = torch.arange(text.shape[1]) % 2 == 1
    ends = [2 * pairs, 2 * (pairs + near), 2 * (pairs + 2 * near)]
    odd_asked = torch.arange(text.shape[1]) % 2 == (ends[2] + settings.reach + 1) % 2
    marks = {
        "first": _span(text, 0, ends[0]) & odd,
        "within": _span(text, ends[1], ends[2]) & odd,
        "beyond": _span(text, ends[2] + settings.reach, text.shape[1]) & odd_asked,
    }
    return Batch(_with_audio(text, settings, generator), marks)


SHIFT_BUCKET = 16


def shift(settings: Settings, batch: int, generator: torch.Generator, at: int | None = None) -> Batch:
    """Every stream has a rule of its own, a random permutation that says which token follows which; then it changes.

    With probability `jump` a step follows no rule; such steps have no mark. A step is `first` when this rule has not
    been seen on its predecessor yet, `within` when it was last seen at most a window ago, `beyond` when farther back
    than attention reaches. `before` are the 32 steps before the change, `since_k` the 16 from k steps after it.

    Args:
        at: step of the change; None draws one from the middle third for the batch.
    """
    length, card = settings.length, settings.card
    if at is None:
        at = length // 3 + int(_draw(length // 3, (), generator))
    rules = torch.stack([_distinct(card, card, batch, generator) for _ in range(2)], 1)
    free = torch.rand(batch, length, generator=generator) < settings.jump
    free[:, 0] = True
    text = _draw(card, (batch, length), generator)
    rows = torch.arange(batch)
    last_seen = torch.full((batch, 2, card), -(10**6))
    age = torch.zeros(batch, length, dtype=torch.long)
    for t in range(1, length):
        rule, previous = int(t >= at), text[:, t - 1]
        follows = ~free[:, t]
        text[:, t] = torch.where(follows, rules[rows, rule, previous], text[:, t])
        age[:, t] = t - last_seen[rows, rule, previous]
        last_seen[rows[follows], rule, previous[follows]] = t
    marks = {
        "first": ~free & (age > length),
        "within": ~free & (age <= settings.window),
        "beyond": ~free & (age > settings.reach) & (age <= length),
        "before": ~free & _span(text, at - 32, at),
    }
    for since in range(0, length - at - SHIFT_BUCKET + 1, SHIFT_BUCKET):
        marks[f"since_{since}"] = ~free & _span(text, at + since, at + since + SHIFT_BUCKET)
    return Batch(_with_audio(text, settings, generator), marks)


MAKE: dict[str, Callable[..., Batch]] = {"recall": recall, "local": local, "assoc": assoc, "shift": shift}
"""The synthetic tasks by name. `speech` adds the one that needs recordings."""


def variations(settings: Settings) -> dict[str, dict[str, int]]:
    """The evaluations of a run by name, with the arguments of the task that each fixes. `""` is the headline."""
    if settings.task in ("recall", "speech"):
        found = {"": {"gap": settings.eval_gap}}
        if settings.sweep:
            windows = settings.gaps if settings.task == "recall" else (1, 2, 4)
            found |= {f"gap {w}": {"gap": w * settings.window} for w in windows}
        return found
    if settings.task == "assoc":
        return {"": {"pairs": max(settings.pairs)}} | {f"pairs {n}": {"pairs": n} for n in settings.pairs}
    return {"": {"at": settings.length // 2}} if settings.task == "shift" else {"": {}}
