"""The table and the figure of the grid `recall`: one model at two sizes of task, its loss over steps and over gaps."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..results import Line, Results, nats
from .blocks import block, table

CONDITIONS = {"none": "no TTT", "on": "TTT, updates on", "off": "same weights, updates off"}
STYLES = {"none": "-", "on": "-", "off": "--"}
WIDTHS = {"none": 6, "on": 1.8, "off": 1.8}  # the controls lie on one another
COLOURS = {"none": "#c4c4c4", "on": "#1f77b4", "off": "#d95f02"}


def _lines(results: Results, cell: str, condition: str) -> list[Line]:
    return results.find(cell, model="none" if condition == "none" else "ttt")


def _by_gap(line: Line, condition: str) -> dict[int, float]:
    """The loss beyond the window by the gap in windows."""
    return {gap: nats(condition, variation=f"gap {gap}")(line) for gap in line["settings"]["gaps"]}


@block
def recalled(results: Results) -> str:
    """First pass and repeat at the headline gap, the repeat by the gap, a row per case, seed and condition."""
    rows = []
    gaps = results.cell_settings(results.cell_names()[0])[0].gaps
    for cell in results.cell_names():
        for condition, name in CONDITIONS.items():
            for line in _lines(results, cell, condition):
                numbers = [nats(condition, "first")(line), nats(condition)(line), *_by_gap(line, condition).values()]
                steps, seed = line["settings"]["steps"], line["settings"]["seed"]
                rows.append([f"{cell}, {steps} steps", name, str(seed), *(f"{number:.2f}" for number in numbers)])
    header = ["case", "model", "seed", "first pass", "repeat", *(f"gap {windows}" for windows in gaps)]
    return table(header, rows)


def draw(results: Results) -> plt.Figure | None:
    """One row per case, all its seeds in it: the loss during training, and against the gap."""
    cells = [cell for cell in results.cell_names() if _lines(results, cell, "on") and _lines(results, cell, "none")]
    if not cells:
        return None
    figure, axes = plt.subplots(len(cells), 2, figsize=(11, 3.6 * len(cells)), squeeze=False, layout="constrained")
    for (left, right), cell in zip(axes, cells, strict=True):
        runs = {condition: _lines(results, cell, condition) for condition in CONDITIONS}
        _plot_training(left, cell, runs)
        _plot_gaps(right, runs)
        for axis in (left, right):
            _add_chance(axis, runs["on"][0]["settings"]["card"])
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(loc="center right", frameon=False, fontsize=9)
    return figure


def _add_chance(axis: plt.Axes, card: int) -> None:
    chance = math.log(card)
    axis.axhline(chance, color="black", linestyle=":", linewidth=1, zorder=0)
    axis.annotate(
        f"chance, ln {card} = {chance:.2f}",
        (0.99, chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 18),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    axis.set_ylim(0, chance + 0.6)


def _plot_training(axis: plt.Axes, cell: str, runs: dict[str, list[Line]]) -> None:
    for condition, name in CONDITIONS.items():
        for number, line in enumerate(runs[condition]):
            points = line["training"]["measured"]
            steps, repeat = zip(*((point["step"], point[condition]["beyond"]) for point in points), strict=True)
            style = {"color": COLOURS[condition], "linewidth": WIDTHS[condition]}
            axis.plot(steps, repeat, STYLES[condition], label=None if number else name + ": repeat", **style)
    for number, line in enumerate(runs["on"]):
        points = [(point["step"], point["on"]["first"]) for point in line["training"]["measured"]]
        label = None if number else CONDITIONS["on"] + ": first pass"
        axis.plot(*zip(*points, strict=True), color=COLOURS["on"], alpha=0.45, linewidth=3.5, label=label)
    settings = runs["on"][0]["settings"]
    seeds = " and ".join(str(line["settings"]["seed"]) for line in runs["on"])
    axis.set_title(f"{cell} case, seed {seeds}, gap of {settings['eval_gap']} steps", fontsize=10)
    axis.set_xlabel("training step")
    axis.set_ylabel("loss, nats per token")
    axis.set_xlim(0, settings["steps"])


def _plot_gaps(axis: plt.Axes, runs: dict[str, list[Line]]) -> None:
    settings = runs["on"][0]["settings"]
    for condition, lines in runs.items():
        for line in lines:
            gaps = _by_gap(line, condition)
            style = {"color": COLOURS[condition], "markersize": 4, "linewidth": WIDTHS[condition]}
            axis.plot(list(gaps), list(gaps.values()), STYLES[condition] + "o", **style)
    for gap in settings["gaps"]:
        found = [_by_gap(line, "on")[gap] for line in runs["on"]]
        position, text = (gap, max(found)), f"{sum(found) / len(found):.2f}"
        axis.annotate(text, position, (0, 7), textcoords="offset points", ha="center", fontsize=8)
    window = settings["window"]
    axis.axvspan(0, 1, color="#bbbbbb", alpha=0.35, linewidth=0)
    axis.text(0.5, 2, "attention window", rotation=90, ha="center", va="center", fontsize=9)
    trained = [settings["gap_min"] / window, settings["gap_max"] / window]
    axis.plot(trained, [2, 2], "|-", color="black", linewidth=1)
    axis.text(sum(trained) / 2, 2.07, "gaps seen in training", ha="center", va="bottom", fontsize=8)
    seeds = ", labels: mean of the seeds" if len(runs["on"]) > 1 else ""
    axis.set_title("Repeat against gap" + seeds, fontsize=10)
    axis.set_xlabel(f"gap, in attention windows of {window} steps")
    axis.set_ylabel("loss on the repeat, nats per token")
    axis.set_xlim(0, 8.4)
