"""`report.png`: the curves of a run, its control if there is one, and the last sample of what it says."""

import os
import re
import wave
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..common.disk import writing
from ..common.files import whole_file
from .control import CONTROL_FOLDER, DIFFERENCE, compared
from .metrics import read_metrics
from .samples import SAMPLES_FOLDER

RELATIVE_DELTA = re.compile(r"ttt/(.+)/relative_delta")

PANELS = (
    ("Loss", "nats"),
    ("What TTT changes in the held-out loss (negative: better)", "nats"),
    ("Relative delta of the fast weights, per layer", "‖delta‖ / ‖W_0‖"),
    ("Learning rates", "rate"),
)


def draw_report(run_dir: Path) -> Path:
    """Draws `report.png` in `run_dir` from what lies there, and returns its path.

    Raises:
        DiskError: when it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train, held_out = (read_metrics(run_dir / f"metrics.{kind}.jsonl") for kind in ("train", "eval"))
    figure = Figure(figsize=(11, 15), layout="constrained")
    FigureCanvasAgg(figure)
    *panels, sound = figure.subplots(len(PANELS) + 1, 1, height_ratios=[*[3] * len(PANELS), 1])
    for axes, (title, unit) in zip(panels, PANELS, strict=True):
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.grid(alpha=0.3)
    loss, difference, delta, rate = panels
    _draw_losses(loss, train, held_out, read_metrics(run_dir / CONTROL_FOLDER / "metrics.eval.jsonl"))
    _draw_differences(difference, compared(run_dir), held_out)
    for entries, style in ((train, "-"), (held_out, "o--")):
        for key in _keys(entries):
            if match := RELATIVE_DELTA.search(key):
                _plot(delta, entries, key, match[1], style)
    for key in filter(_is_rate, _keys(train)):
        _plot(rate, train, key, key, "-")
    values = [value for line in delta.get_lines() for value in line.get_ydata()]
    if values and min(values) > 0:
        delta.set_yscale("log")
    for axes in panels:
        if axes.get_legend_handles_labels()[0]:  # beside the axes, where it covers no curve
            axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
        else:
            axes.text(0.5, 0.5, "nothing was logged", ha="center", transform=axes.transAxes)
    _draw_sample(sound, run_dir)
    path = run_dir / "report.png"
    with writing(path), whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def _draw_losses(axes: Any, train: list[dict], held_out: list[dict], control: list[dict]) -> None:
    for key in filter(_is_loss, _keys(train)):
        _plot(axes, train, key, key if "/" in key else f"train/{key}", "-")
    for key in filter(_is_loss, _keys(held_out)):
        _plot(axes, held_out, key, key if "/" in key else f"eval/{key}", "o--")
    _plot(axes, control, "loss", "control/eval/loss", "s:")


def _draw_differences(axes: Any, with_control: list[dict], held_out: list[dict]) -> None:
    """The honest difference, and the reliance of the weights beside it."""
    _plot(axes, with_control, DIFFERENCE, "with TTT − trained without", "s-")
    known = [entry for entry in with_control if f"{DIFFERENCE}_error" in entry]
    for entry in known:
        middle, error = entry[DIFFERENCE], entry[f"{DIFFERENCE}_error"]
        axes.vlines(entry["step"], middle - error, middle + error, linewidth=1)
    _plot(axes, held_out, "ttt_reliance", "updates on − off, same weights", "o--")
    axes.axhline(0, color="grey", linewidth=0.8, zorder=0)
    if not with_control:
        axes.annotate(
            "no control was trained (control: true)",
            (0.01, 0.03),
            xycoords="axes fraction",
            fontsize="small",
            color="grey",
        )


def _draw_sample(axes: Any, run_dir: Path) -> None:
    """The waveform of Moshi's channel, with its words as the title."""
    axes.set_axis_off()
    paths = sorted((run_dir / SAMPLES_FOLDER).glob("step_*.wav"), key=os.path.getmtime)
    if not paths:
        axes.set_title("No sample was spoken.", fontsize="small")
        return
    with wave.open(str(paths[-1])) as file:
        frames = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
        seconds = np.arange(len(frames)) / file.getframerate()
    axes.plot(seconds, frames[:, 0], linewidth=0.3)
    words = paths[-1].with_suffix(".txt")
    text = words.read_text(encoding="utf-8") if words.is_file() else ""
    axes.set_title(f"{SAMPLES_FOLDER}/{paths[-1].name}\n{text.strip()}", fontsize="small", loc="left", parse_math=False)


def _plot(axes: Any, entries: list[dict[str, Any]], key: str, label: str, style: str) -> None:
    points = [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), (int, float))]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)


def _keys(entries: Iterable[dict[str, Any]]) -> list[str]:
    """All keys of the values, in the order of their first appearance."""
    return [key for key in dict.fromkeys(key for entry in entries for key in entry) if key not in ("step", "time")]


def _is_loss(key: str) -> bool:
    """`loss`, `eval/loss_updates_off`, `text_loss`."""
    name = key.split("/")[-1]
    return name == "loss" or name.startswith("loss_") or name.endswith("_loss")


def _is_rate(key: str) -> bool:
    """`lr`, `lr/targets`, `optim/lr`, `lr_targets`."""
    return any(part == "lr" or part.startswith("lr_") or part.endswith("_lr") for part in key.split("/"))
