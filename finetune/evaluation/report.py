"""What a person reads of an evaluation: tables for the terminal, and the plot of loss against position."""

import io
from typing import Any

import numpy as np

from ..settings.schema import STEPS_PER_SECOND
from .settings import Settings

COLOURS = ("tab:blue", "tab:orange", "tab:green")


def settings_table(settings: Settings) -> str:
    """Key, value and source of all settings in force."""
    table = settings.table()
    return columns(
        [["setting", "value", "from"], *([key, _text(row["value"]), row["source"]] for key, row in table.items())]
    )


def standard_table(result: dict[str, Any]) -> str:
    """Losses in nats of all of it, by codebook and by minutes, with differences and their 95 % intervals."""
    names = ["loss", "text_loss", "audio_loss", "perplexity", "text_perplexity", "audio_perplexity"]
    overall = [["nats per step", *(name.replace("_", " ") for name in names)]]
    overall += [[name, *(_number(row[key]) for key in names)] for name, row in result["overall"].items()]
    for name, row in result["differences"].items():
        overall.append([name, *(_interval(row[key]) for key in names[:3]), "", "", ""])
    codebooks = len(next(iter(result["overall"].values()))["per_codebook"]) - 1
    rows = [["by codebook", "text", *map(str, range(1, codebooks + 1))]]
    rows += [[name, *map(_number, row["per_codebook"])] for name, row in result["overall"].items()]
    stretches = result["by_position"]
    position = [["loss by minutes", *(stretch["minutes"] for stretch in stretches)]]
    position.append(["streams", *(str(stretch["streams"]) for stretch in stretches)])
    for name in result["overall"]:
        position.append([name, *(_number(stretch["conditions"][name]["loss"]) for stretch in stretches)])
    for name in result["differences"]:
        position.append([name, *(_interval(stretch["differences"][name]["loss"]) for stretch in stretches)])
    head = f"{result['streams']} stream{'s' * (result['streams'] != 1)}, {result['seconds'] / 60:.1f} minutes"
    if result["skipped"]:
        head += f"; {len(result['skipped'])} skipped"
    if result["streams"] == 1:
        head += "; one stream has no interval"
    return "\n\n".join([head, columns(overall), columns(rows), columns(position)])


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
    top.set_title(f"{result['streams']} streams, bands: 95 % of resampled streams", fontsize="medium")
    for colour, name in zip(COLOURS[1:], differences, strict=False):
        _line(axes[-1, 0], position, lines[name], colour, name)
    if differences:
        axes[-1, 0].axhline(0, color="black", linewidth=0.8)
        axes[-1, 0].set_ylabel("difference (nats)")
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


def columns(rows: list[list[str]]) -> str:
    """Rows of equal length as aligned text; the first row is a heading, the first column stands on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [all(_looks_numeric(cell) for cell in column[1:]) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _line(axis: Any, position: list[float], line: dict[str, list], colour: str, name: str) -> None:
    axis.plot(position, line["value"], color=colour, label=name, marker="." if len(position) < 50 else None)
    low, high = (np.array(line[key], dtype=float) for key in ("low", "high"))  # None, for a single stream, is NaN
    axis.fill_between(position, low, high, color=colour, alpha=0.2, linewidth=0)


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def _interval(found: dict[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['value']:+.4f}"
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def _text(value: Any) -> str:
    return "null" if value is None else str(value)


def _looks_numeric(cell: str) -> bool:
    return not cell or cell[0] in "+-0123456789"
