"""The plot of an evaluation: loss against position under each condition, and the differences below."""

import io
from typing import Any

import numpy as np

from ..settings.schema import STEPS_PER_SECOND
from .statistics import MIN_RECORDINGS

COLOURS = ("tab:blue", "tab:orange", "tab:green")


def plot(result: dict[str, Any]) -> bytes:
    """A PNG: the loss against the position under each condition, and the differences below, with 95 % bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = result["curve"]["lines"]
    unit, scale = ("minutes", 1) if result["curve"]["minutes"][-1] >= 2 else ("seconds", 60)
    position = [scale * minute for minute in result["curve"]["minutes"]]
    differences = [name for name in lines if name in result["differences"]]
    figure, axes = plt.subplots(
        1 + bool(differences),
        1,
        sharex=True,
        squeeze=False,
        figsize=(10, 4 + 2.5 * bool(differences)),
        layout="constrained",
    )
    top = axes[0, 0]
    for colour, name in zip(COLOURS, result["overall"], strict=False):
        _line(top, position, lines[name], colour, name)
    top.set_ylabel("loss (nats)")
    bands = ", bands: 95 % intervals over recordings" if result["recordings"] >= MIN_RECORDINGS else ""
    top.set_title(f"{result['recordings']} recordings{bands}", fontsize="medium")
    for colour, name in zip(COLOURS[1:], differences, strict=False):
        _line(axes[-1, 0], position, lines[name], colour, name)
    if differences:
        axes[-1, 0].axhline(0, color="black", linewidth=0.8)
        axes[-1, 0].set_ylabel("difference (nats)\nnegative is better")
    window = scale * result["context_steps"] / STEPS_PER_SECOND / 60
    inside = window <= 1.5 * position[-1]
    for axis in axes[:, 0]:
        if inside:
            axis.axvline(window, color="grey", linestyle="--", label=f"attention window, {window:.3g} {unit}")
        axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    beyond = "" if inside else f" (the attention window, {window:.3g} {unit}, lies beyond)"
    axes[-1, 0].set_xlabel(f"{unit} since the stream began{beyond}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _line(axis: Any, position: list[float], line: dict[str, list], colour: str, name: str) -> None:
    axis.plot(position, line["value"], color=colour, label=name, marker="." if len(position) < 50 else None)
    low, high = (np.array(line[key], dtype=float) for key in ("low", "high"))  # None, of too few recordings, is NaN
    axis.fill_between(position, low, high, color=colour, alpha=0.2, linewidth=0)
