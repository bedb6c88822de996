"""How the recall benchmark is shown: the table and the plot of what `recall.run_case` returns."""

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONDITIONS = {"none": "no TTT", "on": "TTT, updates on", "off": "same weights, updates off"}
STYLES = {"none": "-", "on": "-", "off": "--"}
WIDTHS = {"none": 6, "on": 1.8, "off": 1.8}  # the controls lie on one another
COLOURS = {"none": "#c4c4c4", "on": "#1f77b4", "off": "#d95f02"}


def table(runs: list[dict[str, Any]]) -> str:
    """The numbers of `runs` for people: first pass and repeat at the headline gap, repeat at 1 to 8 windows."""
    gap_names = "".join(f"{windows:>6}" for windows in range(1, 9))
    rows = [
        f"{'nats per token':40}{'first':>7}{'repeat':>8}   repeat after a gap of 1 to 8 windows",
        f"{'':58}{gap_names}",
    ]
    for run in runs:
        settings = run["settings"]
        for condition, name in CONDITIONS.items():
            final, gaps = run["final"][condition], run["gaps"][condition]
            rows.append(
                f"{settings['case'] + ', seed ' + str(settings['seed']):14}{name:26}{final['first']:7.2f}"
                f"{final['repeat']:8.2f}   " + "".join(f"{value:6.2f}" for value in gaps.values())
            )
        seconds = run["training"]["ttt"]["seconds"]
        rows.append(f"{'':14}{settings['steps']} steps, TTT trained in {seconds:.0f} s, gap {settings['eval_gap']}")
    return "\n".join([*rows, f"chance: ln {settings['card']} = {math.log(settings['card']):.2f}"])


def plot(results: dict[str, Any], path: Path) -> None:
    """One row per case of `results["runs"]`, all its seeds in it: the loss during training, and against the gap."""
    cases: dict[str, list] = {}
    for run in results["runs"]:
        cases.setdefault(run["settings"]["case"], []).append(run)
    figure, axes = plt.subplots(len(cases), 2, figsize=(11, 3.6 * len(cases)), squeeze=False, layout="constrained")
    for (left, right), runs in zip(axes, cases.values(), strict=True):
        _plot_training(left, runs)
        _plot_gaps(right, runs)
        card = runs[0]["settings"]["card"]
        for axis in (left, right):
            _add_chance(axis, card)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(loc="center right", frameon=False, fontsize=9)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
    plt.close(figure)


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


def _plot_training(axis: plt.Axes, runs: list[dict[str, Any]]) -> None:
    settings = runs[0]["settings"]
    for number, run in enumerate(runs):
        first = [point["first"] for point in run["training"]["ttt"]["curve"]["on"]]
        steps = run["training"]["ttt"]["curve"]["step"]
        for condition, name in CONDITIONS.items():
            curve = run["training"]["none" if condition == "none" else "ttt"]["curve"]
            repeat = [point["repeat"] for point in curve[condition]]
            label = None if number else name + ": repeat"
            axis.plot(
                steps, repeat, STYLES[condition], color=COLOURS[condition], label=label, linewidth=WIDTHS[condition]
            )
        label = None if number else CONDITIONS["on"] + ": first pass"
        axis.plot(steps, first, color=COLOURS["on"], alpha=0.45, linewidth=3.5, label=label)
    seconds = " and ".join(f"{run['training']['ttt']['seconds']:.0f}" for run in runs)
    seeds = " and ".join(str(run["settings"]["seed"]) for run in runs)
    axis.set_title(f"{settings['case']} case, seed {seeds}, gap of {settings['eval_gap']} steps", fontsize=10)
    axis.set_xlabel(f"training step (with TTT {seconds} s in all)")
    axis.set_ylabel("loss, nats per token")
    axis.set_xlim(0, max(run["settings"]["steps"] for run in runs))


def _plot_gaps(axis: plt.Axes, runs: list[dict[str, Any]]) -> None:
    settings = runs[0]["settings"]
    for run in runs:
        for condition in CONDITIONS:
            gaps = run["gaps"][condition]
            windows = [int(key) for key in gaps]
            style = STYLES[condition] + "o"
            axis.plot(
                windows, gaps.values(), style, color=COLOURS[condition], markersize=4, linewidth=WIDTHS[condition]
            )
    for key in runs[0]["gaps"]["on"]:
        values = [run["gaps"]["on"][key] for run in runs]
        position, text = (int(key), max(values)), f"{sum(values) / len(values):.2f}"
        axis.annotate(text, position, (0, 7), textcoords="offset points", ha="center", fontsize=8)
    window = settings["window"]
    axis.axvspan(0, 1, color="#bbbbbb", alpha=0.35, linewidth=0)
    axis.text(0.5, 2, "attention window", rotation=90, ha="center", va="center", fontsize=9)
    trained = [settings["gap_min"] / window, settings["gap_max"] / window]
    axis.plot(trained, [2, 2], "|-", color="black", linewidth=1)
    axis.text(sum(trained) / 2, 2.07, "gaps seen in training", ha="center", va="bottom", fontsize=8)
    axis.set_title("Repeat against gap" + (", labels: mean of the seeds" if len(runs) > 1 else ""), fontsize=10)
    axis.set_xlabel(f"gap, in attention windows of {window} steps")
    axis.set_ylabel("loss on the repeat, nats per token")
    axis.set_xlim(0, 8.4)
