"""How the plateau benchmark is shown: the raw results in one file, tables and a plot.

`python -m benchmarks.evidence.plateau_report FILE.jsonl [--out DIR]` writes `plateau.json` and a plot, prints tables.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.measure import write_json

CHANCE, BAG_OF_WORDS = 3.784, 3.494
"""Nats: ln 44, and the best that counting the tokens heard so far can do on the repeat at a gap of 36."""

FIRST_SIGN = (4.0, 1e-4)
"""Standard errors and nats from which a gain counts, as `finetune.training.advice.Advice` has them."""

DEAD = ("dead_eta", "dead_target_lr", "dead_frozen", "nothing_returns", "nothing_returns_readout_text_5_0.1")


def sign(run: dict[str, Any]) -> int | None:
    """The step of the first evaluation whose gain counts, and those of all that follow."""
    first = None
    for point in run["curve"]:
        gain, error = point.get("gain", 0.0), point.get("gain_error", 0.0)
        counts = gain > FIRST_SIGN[0] * error and gain >= FIRST_SIGN[1]
        first = None if not counts else point["step"] if first is None else first
    return first


def table(runs: list[dict[str, Any]]) -> str:
    """Steps to escape by rows and variant, a number per seed, and the first lasting sign of it."""
    lines = [
        "| audio rows | variant | steps to escape, by seed | first lasting gain | last loss |",
        "|---|---|---|---|---|",
    ]
    groups: dict[tuple, list] = {}
    for run in runs:
        groups.setdefault((run["rows"], run["variant"]), []).append(run)
    for (rows, variant), found in sorted(groups.items()):
        found = sorted(found, key=lambda run: run["seed"])
        steps = ", ".join(f"{run['escaped']}" if run["escaped"] else f"> {run['max_steps']}" for run in found)
        signs = ", ".join("never" if sign(run) is None else f"{sign(run)}" for run in found)
        last = ", ".join(f"{run['curve'][-1]['on']:.2f}" for run in found)
        lines.append(f"| {rows} | {variant} | {steps} | {signs} | {last} |")
    return "\n".join(lines)


def probes(run: dict[str, Any]) -> str:
    """What targets and keys are made of on the way, a line per probed step and layer."""
    names = [name for name in run["probes"][0]["transformer.layers.0.gating"]]
    lines = [f"| step | layer | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for point in run["probes"]:
        for layer, values in ((name, value) for name, value in point.items() if name != "step"):
            cells = " | ".join("" if values[name] is None else f"{values[name]:.3g}" for name in names)
            lines.append(f"| {point['step']} | {layer.split('.')[2]} | {cells} |")
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Loss on the repeat over steps, by rows and variant; and the gain, beside that of runs that cannot learn."""
    shown = {"default": "C3", "readout_eta_0.1": "C1", "text_5_0.1": "C2", "readout_text_5_0.1": "C0"}
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5))
    for axis, rows in zip(axes, (8, 16), strict=False):
        for run in (run for run in runs if run["rows"] == rows and run["variant"] in shown):
            points = [(point["step"], point["on"]) for point in run["curve"]]
            label = run["variant"] if run["seed"] == 0 else None
            axis.plot(*zip(*points, strict=True), color=shown[run["variant"]], label=label, linewidth=1.2)
        for nats, name in ((CHANCE, "chance"), (BAG_OF_WORDS, "bag of words")):
            axis.axhline(nats, color="grey", linewidth=0.7, linestyle=":")
            axis.annotate(name, (0.99, nats), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
        axis.set(title=f"{rows} random audio rows", xlabel="training step", ylabel="nats on the repeat", ylim=(2, 4))
        if axis.get_legend_handles_labels()[1]:
            axis.legend(loc="lower right", fontsize=8)
    for run in (run for run in runs if run["rows"] == 8 and run["variant"] in (*shown, *DEAD)):
        points = [(point["step"], max(point.get("gain", 0.0), 1e-6)) for point in run["curve"]]
        dead = run["variant"] in DEAD
        color, style = ("black", ":") if dead else (shown[run["variant"]], "-")
        axes[2].plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.0)
    axes[2].axhline(FIRST_SIGN[1], color="grey", linewidth=0.7)
    axes[2].plot([], [], color="black", linestyle=":", label="runs that cannot learn")
    axes[2].set(title="8 rows: gain of updates (colours as left)", xlabel="training step", ylabel="nats", yscale="log")
    axes[2].set(xlim=(0, 700), ylim=(1e-6, 3))
    axes[2].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="what plateau.py wrote")
    parser.add_argument("--out", type=Path, default=Path("plateau_out"), metavar="DIR")
    args = parser.parse_args(argv)
    runs = [_rounded(json.loads(line)) for line in args.file.read_text().splitlines()]
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "plateau.json", {"runs": runs})
    plot(runs, args.out / "plateau.png")
    print(table(runs))
    for run in runs:
        if run["probes"] and run["seed"] == 0 and run["variant"] in ("default", "readout_text_5_0.1"):
            print(f"\n{run['rows']} rows, {run['variant']}\n{probes(run)}")


if __name__ == "__main__":
    main()
