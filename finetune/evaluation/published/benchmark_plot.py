"""The plot of the benchmarks: accuracies with their intervals, and the losses of long recordings by length."""

import io
from typing import Any

import numpy as np

from ..conditions import is_difference
from ..loss_plot import COLOURS
from .benchmark_tables import names_in


def plot(results: dict[str, dict[str, Any]]) -> bytes:
    """A PNG: the accuracies with their 95 % intervals, and the losses of long recordings by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    pairs = {name: result for name, result in results.items() if "pairs" in result}
    long = [result for result in results.values() if "buckets" in result]
    parts = bool(pairs) + len(long)
    figure, axes = plt.subplots(1, parts, squeeze=False, figsize=(6 * parts, 4.5), layout="constrained")
    if pairs:
        _draw_accuracies(axes[0, 0], pairs)
    for axis, result in zip(axes[0, bool(pairs) :], long, strict=True):
        _draw_lengths(axis, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _draw_accuracies(axis: Any, pairs: dict[str, dict[str, Any]]) -> None:
    names = [name for name in names_in(next(iter(pairs.values()))) if not is_difference(name)]
    width = 0.8 / len(names)
    for index, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        found = [result[name] for result in pairs.values()]
        place = np.arange(len(found)) + (index - (len(names) - 1) / 2) * width
        axis.bar(place, [one["value"] for one in found], width, color=colour, label=name)
        _draw_intervals(axis, place, found, "black")
    axis.axhline(0.5, color="black", linewidth=0.8, linestyle="--", label="chance")
    axis.set_xticks(range(len(pairs)), [f"{name}\n{result['pairs']} pairs" for name, result in pairs.items()])
    axis.set_ylim(0, 1)
    axis.set_ylabel("accuracy")
    axis.legend(fontsize="small")


def _draw_lengths(axis: Any, result: dict[str, Any]) -> None:
    buckets = result["buckets"]
    for name, colour in zip([name for name in names_in(result) if not is_difference(name)], COLOURS, strict=False):
        found = [bucket[name] for bucket in buckets]
        axis.plot(range(len(found)), [one["value"] for one in found], color=colour, label=name, marker="o")
        _draw_intervals(axis, np.arange(len(found)), found, colour)
    labels = [f"{bucket['from_seconds']:g}-{bucket['to_seconds']:g}\n{bucket['files']}" for bucket in buckets]
    axis.set_xticks(range(len(buckets)), labels, fontsize="small")
    axis.set_xlabel(f"seconds of a recording, and files that reach them (attention: {result['context_seconds']:g} s)")
    axis.set_ylabel("nats per step")
    axis.legend(fontsize="small")
    axis.grid(alpha=0.3)


def _draw_intervals(axis: Any, place: np.ndarray, found: list[dict[str, float | None]], colour: str) -> None:
    """A line between the bounds at each place; none for a single item."""
    known = [
        (where, one["low"], one["high"]) for where, one in zip(place, found, strict=True) if one["low"] is not None
    ]
    if known:
        axis.vlines(*zip(*known, strict=True), color=colour)
