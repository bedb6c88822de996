"""From the sums of many items to means, and to the spread that other items would have given.

Shapes: `N` items, `Q` = 1 + dep_q predicted rows, the text first. All in float64.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (2.5, 97.5)
MEASURES = ("loss", "text_loss", "audio_loss")
AT_ONCE = 100
"""Bootstrap samples computed together."""


@dataclass(frozen=True)
class Sums:
    """Weighted sums of the cross entropy in nats, and the sums of the weights: both `[N, Q]`."""

    nats: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, parts: list[Any]) -> "Sums":
        """From one `[nats [Q], weights [Q]]` per item."""
        stacked = np.asarray(parts, dtype=np.float64)
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


def intervals(sums: Sums, control: Sums | None, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Each of `MEASURES` with a 95 % percentile interval of the bootstrap over items.

    With `control`, the same items under another condition, these are differences `sums - control` in which both are
    resampled together. A single item has no interval.

    Returns:
        By measure `value`, `low` and `high`, the latter None for a single item.
    """
    whole = _values(sums, control, np.ones((1, len(sums))))
    result = {name: {"value": float(whole[name][0]), "low": None, "high": None} for name in MEASURES}
    if len(sums) > 1:
        drawn = _bootstrap(sums, control, samples, seed)
        for name in MEASURES:
            low, high = np.percentile(drawn[name], PERCENTILES)
            result[name] |= {"low": float(low), "high": float(high)}
    return result


def _bootstrap(sums: Sums, control: Sums | None, samples: int, seed: int) -> dict[str, np.ndarray]:
    """`[samples]` by measure: each from N items drawn with replacement."""
    generator, number = np.random.default_rng(seed), len(sums)
    parts = []
    for first in range(0, samples, AT_ONCE):
        size = min(AT_ONCE, samples - first)
        parts.append(_values(sums, control, generator.multinomial(number, np.full(number, 1 / number), size=size)))
    return {name: np.concatenate([part[name] for part in parts]) for name in MEASURES}


def _values(sums: Sums, control: Sums | None, counts: np.ndarray) -> dict[str, np.ndarray]:
    """By measure, for each row of `counts [S, N]`: how often each item is in it."""
    values = means(counts @ sums.nats, counts @ sums.weights)
    if control is not None:
        other = means(counts @ control.nats, counts @ control.weights)
        values = {name: values[name] - other[name] for name in values}
    return values


def _ratio(nats: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`nats / weights`, or 0 where there is no weight."""
    return nats / np.where(weights > 0, weights, 1.0)
