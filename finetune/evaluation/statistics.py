"""From the sums of many items to means, and to the interval that other items would have given.

Shapes: `N` items, `M` means, `S` bootstrap samples, `Q` = 1 + dep_q predicted rows, the text first. All in float64.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..training.held_out import MIN_RECORDINGS

PERCENTILES = (2.5, 97.5)
MEASURES = ("loss", "text_loss", "audio_loss")
AT_ONCE = 100
"""Bootstrap samples computed together."""

TOO_FEW = f"too few recordings for an interval, which takes {MIN_RECORDINGS}"

Interval = dict[str, float | None]
"""`value`, and the bounds `low` and `high` of its 95 % interval, None from fewer than `MIN_RECORDINGS` items."""


@dataclass(frozen=True)
class Sums:
    """Weighted sums of the cross entropy in nats, and the sums of the weights: both `[N, Q]`."""

    nats: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, parts: list[Any], owners: Sequence[Hashable] | None = None) -> "Sums":
        """From `[nats [Q], weights [Q]]` parts, one per item; with `owners` those of one owner are one item."""
        stacked = np.asarray(parts, dtype=np.float64)
        if owners is not None:
            places = {owner: index for index, owner in enumerate(dict.fromkeys(owners))}
            added = np.zeros((len(places), *stacked.shape[1:]))
            np.add.at(added, [places[owner] for owner in owners], stacked)
            stacked = added
        return cls(stacked[:, 0], stacked[:, 1])

    def __len__(self) -> int:
        return len(self.nats)


def means(nats: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """From sums `[..., Q]` the losses of `LossParts`: `MEASURES` `[...]`, `per_codebook` `[..., Q]`."""
    text = _ratio(nats[..., 0], weights[..., 0])
    audio = _ratio(nats[..., 1:].sum(-1), weights[..., 1:].sum(-1))
    return {
        "loss": text + audio,
        "text_loss": text,
        "audio_loss": audio,
        "per_codebook": _ratio(nats, weights),
    }


def summary(sums: Sums) -> dict[str, Any]:
    """Means over all positions of all items, and their perplexities; the text stands first in `per_codebook`."""
    values = means(sums.nats.sum(0), sums.weights.sum(0))
    result: dict[str, Any] = {name: float(values[name]) for name in MEASURES}
    for name in MEASURES:
        result[name.replace("loss", "perplexity")] = float(np.exp(values[name]))
    return result | {"per_codebook": values["per_codebook"].tolist()}


def intervals(sums: Sums, other: Sums | None, samples: int, seed: int) -> dict[str, Interval]:
    """Each of `MEASURES` with its interval; with `other`, of the same items, of the difference `sums - other`.

    The two are resampled together: what the items have in common does not widen the interval of their difference.
    """

    def values(counts: np.ndarray) -> np.ndarray:
        found = [means(counts @ each.nats, counts @ each.weights) for each in (sums, other) if each is not None]
        return np.stack([found[0][name] - (found[1][name] if other is not None else 0) for name in MEASURES], 1)

    return dict(zip(MEASURES, _with_interval(values, len(sums), samples, seed), strict=True))


def mean_interval(sums: np.ndarray, counts: np.ndarray | None = None, *, seed: int, samples: int) -> Interval:
    """The mean `sum(sums) / sum(counts)` over items, with its interval.

    Args:
        sums: `[N]`, of each item.
        counts: `[N]`, how much each item weighs; 1 each by default.
    """
    counts = np.ones(len(sums)) if counts is None else counts
    (found,) = _with_interval(lambda drawn: (drawn @ sums / (drawn @ counts))[:, None], len(sums), samples, seed)
    return found


def _with_interval(values: Callable[[np.ndarray], np.ndarray], number: int, samples: int, seed: int) -> list[Interval]:
    """A mean of all items, for each of `M`, and the middle 95 % of the bootstrap over items.

    Args:
        values: from how often each item is counted, `[S, N]`, to means `[S, M]`.
        number: of items.
    """
    whole = values(np.ones((1, number)))[0]
    bounds = np.full((2, len(whole)), None)
    if number >= MIN_RECORDINGS:
        generator, drawn = np.random.default_rng(seed), []
        for first in range(0, samples, AT_ONCE):
            size = min(AT_ONCE, samples - first)
            drawn.append(values(generator.multinomial(number, np.full(number, 1 / number), size=size)))
        bounds = np.percentile(np.concatenate(drawn), PERCENTILES, axis=0).tolist()
    return [{"value": float(value), "low": low, "high": high} for value, low, high in zip(whole, *bounds, strict=True)]


def _ratio(nats: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`nats / weights`, or 0 where there is no weight."""
    return nats / np.where(weights > 0, weights, 1.0)
