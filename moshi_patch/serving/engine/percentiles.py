"""How long steps took, as an operator is told."""

import numpy as np


def percentiles(seconds: np.ndarray) -> dict[str, float | None]:
    """`p50` and `p99` in milliseconds; None where there are no steps."""
    if not len(seconds):
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
