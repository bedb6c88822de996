"""What the terminal shows of an evaluation of losses: the verdict, then the tables."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..common.tables import columns
from ..settings.evaluation import EvalArgs
from ..settings.parsing import flat
from .conditions import MEANINGS, RELIANCE
from .settings_in_force import Settings
from .statistics import MIN_RECORDINGS, TOO_FEW
from .verdict import verdict

LOSSES = ("loss", "text_loss", "audio_loss")
PERPLEXITIES = ("perplexity", "text_perplexity", "audio_perplexity")


def settings_table(settings: Settings) -> str:
    """Key, value and source of the settings in force whose values are not the defaults."""
    defaults = flat(dataclasses.asdict(EvalArgs()))
    rows = [
        [key, _text(row["value"]), row["source"]]
        for key, row in settings.table().items()
        if row["value"] != defaults[key]
    ]
    return columns(["setting", "value", "from"], rows)


def standard_page(result: Mapping[str, Any]) -> str:
    """Who won; then losses in nats of all of it, by codebook and by minutes, with their differences."""
    parts = [_overall(result), _by_codebook(result), _by_minutes(result)]
    if result.get("by_layer"):
        parts.append(_by_layer(result["by_layer"]))
    return "\n\n".join(["\n".join([*verdict(result), *result.get("notes", [])]), head(result), *parts])


def head(result: Mapping[str, Any]) -> str:
    """What was heard, and how the numbers are to be read."""
    recordings, streams = result.get("recordings", result["streams"]), result["streams"]
    text = f"{recordings} recording{'s' * (recordings != 1)}"
    if streams != recordings:
        text += f" in {streams} streams"
    text += f", {result['seconds'] / 60:.1f} minutes"
    if result.get("skipped"):
        text += f"; {len(result['skipped'])} skipped"
    intervals = "In brackets 95 % intervals over recordings."
    lines = [f"{text}. {intervals if recordings >= MIN_RECORDINGS else f'There are {TOO_FEW}.'}"]
    differences = result.get("differences", {})
    if differences:
        lines.append("Of differences, negative is better.")
    lines += [f"{name}: {MEANINGS[name]}." for name in differences if name in MEANINGS]
    return "\n".join(lines)


def number(value: float | None) -> str:
    """A loss or a perplexity."""
    if value is None:
        return "not finite"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def difference(found: Mapping[str, float | None]) -> str:
    """`-0.0312 [-0.0500, -0.0120]`, of a difference and its interval if it has one."""
    bounds = "" if found["low"] is None else f" [{found['low']:+.4f}, {found['high']:+.4f}]"
    return f"{found['value']:+.4f}{bounds}"


def _overall(result: Mapping[str, Any]) -> str:
    names = (*LOSSES, *PERPLEXITIES)
    rows = [[name, *(number(row[key]) for key in names)] for name, row in result["overall"].items()]
    for name, row in result["differences"].items():
        rows.append([name, *(difference(row[key]) for key in LOSSES), *("" for _ in PERPLEXITIES)])
    return columns(["nats per step", *(name.replace("_", " ") for name in names)], rows)


def _by_codebook(result: Mapping[str, Any]) -> str:
    rows = [[name, *map(number, row["per_codebook"])] for name, row in result["overall"].items()]
    return columns(["by codebook", "text", *range(1, len(rows[0]) - 1)], rows)


def _by_minutes(result: Mapping[str, Any]) -> str:
    stretches = result["by_position"]
    rows = [["streams", *(stretch["streams"] for stretch in stretches)]]
    for name in result["overall"]:
        rows.append([name, *(number(stretch["conditions"][name]["loss"]) for stretch in stretches)])
    for name in result["differences"]:
        rows.append([name, *(difference(stretch["differences"][name]["loss"]) for stretch in stretches)])
    return columns(["loss by minutes", *(stretch["minutes"] for stretch in stretches)], rows)


def _by_layer(layers: Mapping[str, Any]) -> str:
    names = [key.replace("_", " ") for key in LOSSES]
    rows = [
        [layer, *(number(row[key]) for key in LOSSES), *(difference(row[RELIANCE][key]) for key in LOSSES)]
        for layer, row in layers.items()
    ]
    return columns(["layer without updates", *names, *(f"{RELIANCE} on it, {name}" for name in names)], rows)


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
