"""The tables and the figure of the grid `plateau`: how many steps until memory sets in, and what shows it early."""

import math
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..results import Line, Results
from ..settings import Settings
from .blocks import block, table

BAG_OF_WORDS = 3.494
"""Nats: the best that counting the tokens heard so far can do on the repeat at a gap of 36."""

GAIN_COUNTS = (4.0, 1e-4)
"""Standard errors and nats from which a gain counts, as `finetune.training.advice.Advice` has them."""

BOTH_OPTIONS = "readout, text rate 5 ×, η 0.1"
SHOWN = {"as shipped": "C3", "readout, η 0.1": "C1", "text rate 5 ×, η 0.1": "C2", BOTH_OPTIONS: "C0"}
"""Variants in the figure and their colours."""


PROBE_COLUMNS = {
    "text_in_x0": "text in x0",
    "text_in_v": "text in v",
    "mean_in_z": "common part of z",
    "contrast": "contrast",
    "delta_to_out": "delta / out",
    "readout": "readout",
}
PROBED = (
    *((0, "as shipped", 0), (1, "as shipped", 0), (1, "as shipped", 100)),
    *((8, "as shipped", 0), (8, "as shipped", 200), (8, "as shipped", 800), (8, "target rate 0 ×", 200)),
    *((8, "readout, text rate 5 ×", 100), (8, "readout, text rate 5 ×", 200)),
    *((16, "as shipped", 0), (16, "as shipped", 400)),
)
"""Audio rows, variant and training step of the probes on the page; all are of seed 0."""


def variant(settings: dict[str, Any]) -> str:
    """What a run of the grid changes of the shipped defaults, in words."""
    lr, default = settings["lr"], Settings()
    further = dict(settings.get("ttt", ()))
    named = {
        "no TTT": settings["model"] == "none",
        "nothing returns": not settings.get("returns", True),
        "readout": settings.get("init_target") == "readout",
        f"text rate {settings.get('text_lr', lr) / lr:g} ×": settings.get("text_lr", lr) != lr,
        f"target rate {settings['target_lr'] / lr:g} ×": settings["target_lr"] != 5 * lr,
        f"filter rate {(settings.get('conv_lr') or lr) / lr:g} ×": settings.get("conv_lr") is not None,
        f"learning rate {lr:g}": lr != 2e-3,
        f"η {settings['rate']:g}": settings["rate"] != default.rate,
        f"residual, g {further.get('target_gain', 1):g}": further.get("update") == "residual",
        f"layer {settings['ttt_layers']}": settings["ttt_layers"] != default.ttt_layers,
        f"clip {settings['clip']}": settings["clip"] is not None,
        f"batch {settings['batch']}": settings["batch"] != default.batch,
        f"gap {settings['gap_min']} to {settings['gap_max']}": settings["gap_max"] != default.gap_max,
    }
    return ", ".join(name for name, holds in named.items() if holds) or "as shipped"


def audio_rows(settings: dict[str, Any]) -> int:
    """Rows of random audio in x0; 0 where text is alone."""
    return 0 if settings["audio"] == "zero" else settings["audio_rows"]


def can_learn(settings: dict[str, Any]) -> bool:
    """False for the runs that are dead on purpose."""
    dead = settings["rate"] < 1e-6 or settings["target_lr"] < 1e-6 or not settings.get("returns", True)
    return settings["model"] == "ttt" and not dead


def first_lasting_gain(line: Line) -> int | None:
    """The step of the first evaluation whose gain counts, and those of all that follow."""
    first = None
    for point in line["training"]["measured"]:
        gain, error = point.get("gain", 0.0), point.get("gain_error", 0.0)
        counts = gain > GAIN_COUNTS[0] * error and gain >= GAIN_COUNTS[1]
        first = None if not counts else point["step"] if first is None else first
    return first


def _repeat(point: dict[str, Any]) -> float:
    return point["on" if "on" in point else "none"]["beyond"]


def _finished(results: Results) -> list[Line]:
    """The lines of the grid, by audio rows, variant and seed."""
    lines = [line for line in results.lines.values() if line["status"] == "ok" and "measured" in line["training"]]
    known = [(audio_rows(line["settings"]), variant(line["settings"]), line["settings"]["seed"]) for line in lines]
    return [line for _, line in sorted(zip(known, lines, strict=True), key=lambda pair: pair[0])]


@block
def escapes(results: Results) -> str:
    """Steps to escape by audio rows and variant, a number per seed, and the first lasting sign of it."""
    groups: dict[tuple[int, str], list[Line]] = {}
    for line in _finished(results):
        groups.setdefault((audio_rows(line["settings"]), variant(line["settings"])), []).append(line)
    rows = []
    for (number, name), lines in groups.items():
        stops = [(line["training"]["stopped"], line["settings"]["steps"]) for line in lines]
        signs = ["never" if first_lasting_gain(line) is None else str(first_lasting_gain(line)) for line in lines]
        last = [f"{_repeat(line['training']['measured'][-1]):.2f}" for line in lines]
        steps = ", ".join(f"> {limit}" if stopped is None else str(stopped) for stopped, limit in stops)
        rows.append([str(number), name, steps, ", ".join(signs), ", ".join(last)])
    header = ["audio rows", "variant", "steps to escape, by seed", "first lasting gain", "last loss, nats"]
    return table(header, rows)


@block
def probed(results: Results) -> str:
    """What targets and keys of the chosen runs are made of; first / second / third TTT layer."""
    rows = []
    for number, name, step in PROBED:
        for line in _finished(results):
            settings = line["settings"]
            if (audio_rows(settings), variant(settings), settings["seed"]) != (number, name, 0):
                continue
            for point in line["training"]["probes"]:
                if point["step"] == step:
                    layers = [values for key, values in point.items() if key != "step"]
                    rows.append([str(number), name, str(step), *(_layers(layers, key) for key in PROBE_COLUMNS)])
    return table(["audio rows", "variant", "step", *PROBE_COLUMNS.values()], rows)


def _layers(layers: list[dict[str, float | None]], key: str) -> str:
    values = [layer[key] for layer in layers]
    if None in values:
        return ""
    texts = [f"{value:,.0f}" if abs(value) >= 10 else f"{value:.2f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def draw(results: Results) -> plt.Figure | None:
    """Loss on the repeat over steps, by audio rows and variant; and the gain, beside that of runs that cannot learn."""
    lines = _finished(results)
    if not lines:
        return None
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for axis, rows in zip(axes[:2], (8, 16), strict=True):
        _draw_losses(axis, [line for line in lines if audio_rows(line["settings"]) == rows])
        axis.set(title=f"{rows} random audio rows", xlabel="training step", ylabel="nats on the repeat", ylim=(2, 4))
    _draw_gains(axes[2], [line for line in lines if audio_rows(line["settings"]) == 8])
    axes[2].set(title="8 rows: gain of updates (colours as left)", xlabel="training step", ylabel="nats", yscale="log")
    axes[2].set(xlim=(0, 700), ylim=(1e-6, 3))
    for axis in axes:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc="lower right", fontsize=8)
    return figure


def _draw_losses(axis: plt.Axes, lines: list[Line]) -> None:
    for line in lines:
        name = variant(line["settings"])
        if name in SHOWN:
            points = [(point["step"], _repeat(point)) for point in line["training"]["measured"]]
            label = None if line["settings"]["seed"] else name
            axis.plot(*zip(*points, strict=True), color=SHOWN[name], label=label, linewidth=1.2)
    for nats, name in ((math.log(Settings().card), "chance"), (BAG_OF_WORDS, "bag of words")):
        axis.axhline(nats, color="grey", linewidth=0.7, linestyle=":")
        axis.annotate(name, (0.99, nats), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)


def _draw_gains(axis: plt.Axes, lines: list[Line]) -> None:
    for line in lines:
        name, alive = variant(line["settings"]), can_learn(line["settings"])
        if line["settings"]["model"] == "none" or (alive and name not in SHOWN):
            continue
        points = [(point["step"], max(point["gain"], 1e-6)) for point in line["training"]["measured"]]
        colour, style = (SHOWN[name], "-") if alive else ("black", ":")
        axis.plot(*zip(*points, strict=True), color=colour, linestyle=style, linewidth=1.0)
    axis.axhline(GAIN_COUNTS[1], color="grey", linewidth=0.7)
    axis.plot([], [], color="black", linestyle=":", label="runs that cannot learn")
