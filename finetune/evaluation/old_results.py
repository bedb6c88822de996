"""Reads an `eval.json` that an older version wrote, as today's would be."""

from collections.abc import Mapping
from typing import Any

from ..common.errors import ConfigError
from .conditions import OFF, ON, RELIANCE
from .statistics import MEASURES, MIN_RECORDINGS

OLD_RELIANCE = f"{ON} - {OFF}"
"""How the reliance was called before 2026-11-25; in pairs it was a difference of accuracies, in which positive is
better."""


def with_todays_names(results: Mapping[str, Any]) -> dict[str, Any]:
    """The content of an `eval.json` of any age: today's names and signs, no interval from too few recordings.

    Raises:
        ConfigError: for losses that are not finite, which are no result.
    """
    new = dict(results)
    standard, paper = results.get("standard"), results.get("paper")
    overall = standard.get("overall") if isinstance(standard, Mapping) else None
    rows = list(overall.values()) if isinstance(overall, Mapping) else []
    if any(row[key] is None for row in rows for key in MEASURES if key in row):
        raise ConfigError("the losses in eval.json are not finite, which is no result; evaluate again.")
    if isinstance(standard, Mapping) and isinstance(standard.get("differences"), Mapping):
        differences = _renamed(standard["differences"])
        if standard.get("recordings", standard.get("streams", 0)) < MIN_RECORDINGS:
            differences = {name: _without_intervals(row) for name, row in differences.items()}
        new["standard"] = {**standard, "differences": differences}
    if isinstance(paper, Mapping):
        new["paper"] = {name: _benchmark(result) for name, result in paper.items()}
    return new


def _benchmark(result: Mapping[str, Any]) -> Mapping[str, Any]:
    if "differences" in result.get("meaning", {}):
        return result
    if "buckets" in result:
        return {**result, "buckets": [_renamed(bucket) for bucket in result["buckets"]]}
    return _renamed({name: _flipped(value) if " - " in name else value for name, value in result.items()})


def _renamed(differences: Mapping[str, Any]) -> dict[str, Any]:
    return {RELIANCE if name == OLD_RELIANCE else name: value for name, value in differences.items()}


def _flipped(found: Mapping[str, Any]) -> dict[str, Any]:
    """A difference of accuracies as one of errors."""
    value, low, high = (None if found[key] is None else 0.0 - found[key] for key in ("value", "low", "high"))
    return {"value": value, "low": high, "high": low}


def _without_intervals(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {**found, "low": None, "high": None} if isinstance(found, Mapping) else found
        for name, found in row.items()
    }
