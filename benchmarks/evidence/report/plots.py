"""The figures of docs/evidence.md, from the results alone: mean over seeds as a line, lowest to highest as a band."""

import math
from collections.abc import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..results import Line, Results, mean, nats, values
from ..settings import Settings
from ..tasks import SHIFT_BUCKET
from .continued import CONTINUED
from .memory import ONE_AT_A_TIME, changed
from .streams import HEARD

GREY, BLUE, ORANGE, GREEN = "#8a8a8a", "#1f77b4", "#d95f02", "#2a9d5c"
CONDITIONS = {
    "no TTT": ("none", GREY, "-"),
    "longer attention of equal memory": ("none", GREEN, "-"),
    "TTT": ("on", BLUE, "-"),
    "the same weights, updates off": ("off", ORANGE, "--"),
}


def _band(axis: plt.Axes, x: list[float], columns: list[list[float]], colour: str, style: str, label: str) -> None:
    kept = [(place, column) for place, column in zip(x, columns, strict=True) if column]
    if not kept:
        return
    places = [place for place, _ in kept]
    axis.plot(places, [mean(column) for _, column in kept], style + "o", color=colour, markersize=3.5, label=label)
    low, high = ([pick(column) for _, column in kept] for pick in (min, max))
    axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)


def _chance(axis: plt.Axes, value: float, text: str) -> None:
    axis.axhline(value, color="black", linestyle=":", linewidth=1, zorder=0)
    axis.annotate(
        text, (0.99, value), xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip


def _groups(results: Results, cell: str, longer: str | None = None) -> dict[str, list[Line]]:
    ttt = results.find(cell, model="ttt")
    groups = {"no TTT": results.find(cell, model="none")}
    if longer:
        groups["longer attention of equal memory"] = results.find(longer)
    return groups | {"TTT": ttt, "the same weights, updates off": ttt}


def draw_memory(results: Results) -> plt.Figure | None:
    recall = _groups(results, "recall", "recall equal bytes")
    if not recall["TTT"]:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    windows = [1, 2, 4, 8, 12, 16]
    pairs_cell = _groups(results, "associations")
    pairs = pairs_cell["TTT"][0]["settings"]["pairs"] if pairs_cell["TTT"] else []
    moved = _groups(results, "shift")
    since = list(range(0, 112, SHIFT_BUCKET))
    for name, (condition, colour, style) in CONDITIONS.items():
        read = [nats(condition, variation=f"gap {w}") for w in windows]
        _band(axes[0], windows, [values(recall[name], r) for r in read], colour, style, name)
        if name in pairs_cell:
            reads = [nats(condition, variation=f"pairs {n}", kind="hits") for n in pairs]
            columns = [[100 * v for v in values(pairs_cell[name], r)] for r in reads]
            _band(axes[1], pairs, columns, colour, style, name)
            reads = [nats(condition, "before"), *(nats(condition, f"since_{s}") for s in since)]
            places = [-16.0, *(s + SHIFT_BUCKET / 2 for s in since)]
            _band(axes[2], places, [values(moved[name], r) for r in reads], colour, style, name)
    _label(axes[0], "Recall: a part of 32 tokens returns", "gap, in attention windows", "nats per token")
    _chance(axes[0], math.log(Settings().card), "chance")
    _label(axes[1], "Associations: value asked after the window", "pairs stated", "accuracy, %")
    _label(axes[2], "The rule of the stream changes at 0", "steps since the change", "nats per ruled step")
    axes[2].axvline(0, color="black", linewidth=0.8)
    axes[0].legend(frameon=False, fontsize=8, loc="center right")
    return figure


def _label(axis: plt.Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)


def draw_settings(results: Results) -> plt.Figure | None:
    rows = [("as in the first table", results.find("recall", model="ttt"), "on")]
    for name in ONE_AT_A_TIME:
        for chosen in results.cell_settings(name) if results.has(name) else []:
            rows.append((" = ".join(changed(chosen)), results.same(chosen), "on"))
    return _dots(rows)


def draw_continued(results: Results) -> plt.Figure | None:
    return _dots(
        [
            (name, results.find(cell, **chosen), "none" if chosen.get("model") == "none" else "on")
            for name, cell, chosen in CONTINUED
        ]
    )


def _dots(rows: list[tuple[str, list[Line], str]]) -> plt.Figure | None:
    """One row per name: a dot per seed and a stroke for the mean, within the window and beyond it."""
    rows = [row for row in rows if row[1]]
    if len(rows) < 2:
        return None
    figure, axes = plt.subplots(
        1, 2, figsize=(11, 0.27 * len(rows) + 1.2), layout="constrained", sharey=True, sharex=True
    )
    for axis, mark in zip(axes, ("beyond", "within"), strict=True):
        for place, (_, lines, condition) in enumerate(reversed(rows)):
            found = values(lines, nats(condition, mark))
            colour = GREY if condition == "none" else BLUE
            axis.plot(found, [place] * len(found), "o", color=colour, markersize=4, alpha=0.6)
            axis.plot([mean(found)], [place], "|", color=colour, markersize=13, markeredgewidth=2)
        axis.axvline(math.log(Settings().card), color="black", linestyle=":", linewidth=1)
        axis.set_xlabel(f"nats {mark} the window")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.2)
    axes[0].set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)], fontsize=8)
    axes[0].set_xlim(0, 4.4)
    return figure


def draw_streams(results: Results) -> plt.Figure | None:
    if not results.find("stream"):
        return None
    figure, axes = plt.subplots(2, 3, figsize=(13, 6), layout="constrained", sharex=True)
    names = {
        "fresh": "between the parts: random tokens",
        "silence": "one token (silence)",
        "own": "the model's own samples",
    }
    curves: list[tuple[str, str, Callable[[str], list[Line]]]] = [
        (f"decay {decay}", colour, lambda heard, d=decay: results.find("stream", stream=heard, stream_decay=d))
        for decay, colour in ((1.0, BLUE), (0.99, GREEN), (0.9, ORANGE))
    ]
    for name, cell, colour in (
        ("clip 10, decay 0.9", "stream with clip", "#7b4ea3"),
        ("silence in training, decay 0.9", "stream trained with silence", "#a0522d"),
    ):
        curves.append((name, colour, lambda heard, c=cell: results.find(c, stream=heard, stream_decay=0.9)))
    for column, heard in enumerate(HEARD):
        for name, colour, find in curves:
            lines = find(heard)
            points = [point["windows"] for point in lines[0]["stream"]["on"]] if lines else []
            losses = [[line["stream"]["on"][i]["beyond"] for line in lines] for i in range(len(points))]
            deltas = [[mean(line["stream"]["on"][i]["relative_delta"]) for line in lines] for i in range(len(points))]
            _band(axes[0, column], points, losses, colour, "-", name)
            _band(axes[1, column], points, deltas, colour, "-", name)
        _label(axes[0, column], names[heard], "", "nats, returned part")
        _chance(axes[0, column], math.log(Settings().card), "chance")
        axes[0, column].set_ylim(0, 4.4)
        _label(axes[1, column], "", "windows streamed", "delta norm / norm of W_down")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure
