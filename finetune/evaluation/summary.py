"""The content of `eval.json` for the standard evaluation: means, differences and intervals from the streams' sums."""

import math
from itertools import pairwise
from typing import Any

import numpy as np

from ..data.segments import Segment
from ..settings.evaluation import EvalArgs
from ..settings.schema import STEPS_PER_SECOND
from .conditions import MUTED, RELIANCE, difference_name
from .result_store import ResultStore
from .scoring import MINUTES, scored_streams
from .statistics import MEASURES, Sums, intervals, means, summary
from .streams import Streams, item_id

Values = dict[str, list[dict[str, Any]]]
"""By condition, what is stored of each stream, in the same order."""


def summarise(streams: Streams, kinds: dict[str, str], store: ResultStore, args: EvalArgs, context: int) -> dict:
    """Everything that is reported of the streams that were scored under all conditions.

    Args:
        kinds: by condition, under which name it is stored. The first is compared with each of the others; those of
            `muting_conditions` are reported by layer.
        context: of the checkpoint's attention, in steps.

    Raises:
        BrokenData: when more than 5 % of the streams could not be read.
    """
    segments = scored_streams(streams, kinds, store)
    recordings = [str(one.path) for one in segments]
    values = {name: [store.get(kind, item_id(one)) for one in segments] for name, kind in kinds.items()}
    skipped = [str(one) for one in streams.segments if one not in set(segments)]
    steps = [one["steps"] for one in next(iter(values.values()))]
    muted = {name.removeprefix(MUTED): values.pop(name) for name in kinds if name.startswith(MUTED)}
    overall = {name: Sums.of([one["sums"] for one in rows], recordings) for name, rows in values.items()}
    return {
        "recordings": len(set(recordings)),
        "streams": len(segments),
        "skipped": skipped,
        "seconds": sum(steps) / STEPS_PER_SECOND,
        "context_steps": context,
        "bootstrap_samples": args.bootstrap_samples,
        "overall": {name: summary(sums) for name, sums in overall.items()},
        "differences": _differences(overall, args),
        "by_layer": _by_layer(next(iter(overall.values())), muted, recordings, args),
        "by_position": _by_position(values, recordings, args),
        "curve": _curve(values, recordings, streams.curve_steps, args),
        "items": [_item(segment, index, values) for index, segment in enumerate(segments)],
    }


def minutes_of(first: float, end: float) -> str:
    """`"4-8"`, or `"30+"`."""
    return f"{first}+" if math.isinf(end) else f"{first}-{end}"


def _differences(sums: dict[str, Sums], args: EvalArgs) -> dict[str, dict[str, Any]]:
    """The first condition minus each of the others, see `difference_name`."""
    (first, ours), *others = sums.items()
    return {
        difference_name(first, other): intervals(ours, theirs, args.bootstrap_samples, args.seed)
        for other, theirs in others
    }


def _by_layer(
    served: Sums, muted: dict[str, list[dict[str, Any]]], recordings: list[str], args: EvalArgs
) -> dict[str, dict[str, Any]]:
    """By TTT layer, the losses when it alone learns nothing, and how far the weights lean on its updates."""
    result = {}
    for layer, rows in muted.items():
        sums = Sums.of([one["sums"] for one in rows], recordings)
        reliance = intervals(served, sums, args.bootstrap_samples, args.seed)
        result[layer] = {**summary(sums), RELIANCE: reliance}
    return result


def _by_position(values: Values, recordings: list[str], args: EvalArgs) -> list[dict[str, Any]]:
    """One entry per stretch of minutes that any stream reaches, over the streams that do."""
    result = []
    for index, (first, end) in enumerate(pairwise(MINUTES)):
        stretches = {name: [one["by_position"][index] for one in rows] for name, rows in values.items()}
        parts, number = _of_those_that_reach(stretches, recordings)
        if number:
            result.append(
                {
                    "minutes": minutes_of(first, end),
                    "streams": number,
                    "conditions": {name: summary(part) for name, part in parts.items()},
                    "differences": _differences(parts, args),
                }
            )
    return result


def _curve(values: Values, recordings: list[str], curve_steps: int, args: EvalArgs) -> dict[str, Any]:
    """The loss against the position: for every point the middle in minutes, and lines with their intervals."""
    points = max(len(one["curve"]) for rows in values.values() for one in rows)
    lines: dict[str, dict[str, list]] = {}
    for index in range(points):
        places = {
            name: [one["curve"][index] if index < len(one["curve"]) else None for one in rows]
            for name, rows in values.items()
        }
        sums, _ = _of_those_that_reach(places, recordings)
        here = {name: intervals(part, None, args.bootstrap_samples, args.seed) for name, part in sums.items()}
        for name, found in (here | _differences(sums, args)).items():
            line = lines.setdefault(name, {"value": [], "low": [], "high": []})
            for key in line:
                line[key].append(found["loss"][key])
    width = curve_steps / STEPS_PER_SECOND / 60
    return {"minutes": [width * (index + 0.5) for index in range(points)], "lines": lines}


def _of_those_that_reach(places: dict[str, list[Any | None]], recordings: list[str]) -> tuple[dict[str, Sums], int]:
    """By condition the sums of each recording, and how many streams reach the place; others have None."""
    reaching = [index for index, sums in enumerate(next(iter(places.values()))) if sums is not None]
    if not reaching:
        return {}, 0
    owners = [recordings[index] for index in reaching]
    return {name: Sums.of([rows[index] for index in reaching], owners) for name, rows in places.items()}, len(reaching)


def _item(segment: Segment, index: int, values: Values) -> dict[str, Any]:
    conditions = {}
    for name, rows in values.items():
        found = means(*np.asarray(rows[index]["sums"], dtype=np.float64))
        conditions[name] = {measure: float(found[measure]) for measure in MEASURES}
        conditions[name]["per_codebook"] = found["per_codebook"].tolist()
    return {
        "path": str(segment.path),
        "first_step": segment.first_step,
        "steps": next(iter(values.values()))[index]["steps"],
        "conditions": conditions,
    }
