"""How certain a mean is: a bootstrap over items."""

import numpy as np


def mean_interval(
    sums: np.ndarray, counts: np.ndarray | None = None, *, seed: int, samples: int, level: float = 0.95
) -> dict[str, float | None]:
    """The mean `sum(sums) / sum(counts)` over items, and the bounds of the middle `level` of its bootstrap.

    Args:
        sums: `[N]`, of each item, which are drawn `samples` times with replacement.
        counts: `[N]`, how much each item weighs; 1 each by default.

    Returns:
        `value`, `low` and `high`. One item tells nothing about the spread: its bounds are None.
    """
    counts = np.ones_like(sums) if counts is None else counts
    result = {"value": float(sums.sum() / counts.sum()), "low": None, "high": None}
    if len(sums) > 1:
        generator = np.random.default_rng(seed)
        draws = (generator.integers(len(sums), size=len(sums)) for _ in range(samples))
        means = [sums[drawn].sum() / counts[drawn].sum() for drawn in draws]
        low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
        result |= {"low": float(low), "high": float(high)}
    return result
