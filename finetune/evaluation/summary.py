"""The content of `eval.json` for the standard evaluation: means, differences and intervals from the streams' sums."""

import math
from itertools import pairwise
from typing import Any

import numpy as np

from ..data.segments import Segment
from ..settings.evaluation import EvalArgs
from ..settings.schema import STEPS_PER_SECOND
from .result_store import ResultStore
from .scoring import MINUTES, scored_streams
from .statistics import MEASURES, Sums, intervals, means, summary
from .streams import Streams, item_id

Values = dict[str, list[dict[str, Any]]]
"""By condition, what is stored of each stream, in the same order."""


def summarise(streams: Streams, kinds: dict[str, str], store: ResultStore, args: EvalArgs, context: int) -> dict:
    """Everything that is reported of the streams that were scored under all conditions.

    Args:
        kinds: by condition, under which name it is stored. The first is compared with each of the others.
        context: of the checkpoint's attention, in steps.

    Raises:
        BrokenData: when more than 5 % of the streams could not be read.
    """
    segments = scored_streams(streams, kinds, store)
    values = {name: [store.get(kind, item_id(one)) for one in segments] for name, kind in kinds.items()}
    skipped = [str(one) for one in streams.segments if one not in set(segments)]
    steps = [one["steps"] for one in next(iter(values.values()))]
    overall = {name: Sums.of([one["sums"] for one in rows]) for name, rows in values.items()}
    return {
        "streams": len(segments),
        "skipped": skipped,
        "seconds": sum(steps) / STEPS_PER_SECOND,
        "context_steps": context,
        "bootstrap_samples": args.bootstrap_samples,
        "overall": {name: summary(sums) for name, sums in overall.items()},
        "differences": _differences(overall, args),
        "by_position": _by_position(values, args),
        "curve": _curve(values, streams.curve_steps, args),
        "items": [_item(segment, index, values, overall) for index, segment in enumerate(segments)],
    }


def minutes_of(first: float, end: float) -> str:
    """`"4-8"`, or `"30+"`."""
    return f"{first}+" if math.isinf(end) else f"{first}-{end}"


def _differences(sums: dict[str, Sums], args: EvalArgs) -> dict[str, dict[str, Any]]:
    """The first condition minus each of the others; negative is in favour of the first."""
    (name, first), *others = sums.items()
    return {
        f"{name} - {other}": intervals(first, control, args.bootstrap_samples, args.seed) for other, control in others
    }


def _by_position(values: Values, args: EvalArgs) -> list[dict[str, Any]]:
    """One entry per stretch of minutes that any stream reaches, over the streams that do."""
    result = []
    for index, (first, end) in enumerate(pairwise(MINUTES)):
        stretches = {name: [one["by_position"][index] for one in rows] for name, rows in values.items()}
        sums = {name: [one for one in rows if one is not None] for name, rows in stretches.items()}
        number = len(next(iter(sums.values())))
        if number:
            parts = {name: Sums.of(rows) for name, rows in sums.items()}
            result.append(
                {
                    "minutes": minutes_of(first, end),
                    "streams": number,
                    "conditions": {name: summary(part) for name, part in parts.items()},
                    "differences": _differences(parts, args),
                }
            )
    return result


def _curve(values: Values, curve_steps: int, args: EvalArgs) -> dict[str, Any]:
    """The loss against the position: for every point the middle in minutes, and lines with their intervals."""
    points = max(len(one["curve"]) for rows in values.values() for one in rows)
    lines: dict[str, dict[str, list]] = {}
    for index in range(points):
        reaching = {
            name: [one["curve"][index] for one in rows if index < len(one["curve"])] for name, rows in values.items()
        }
        sums = {name: Sums.of(rows) for name, rows in reaching.items()}
        here = {name: intervals(part, None, args.bootstrap_samples, args.seed) for name, part in sums.items()}
        for name, found in (here | _differences(sums, args)).items():
            line = lines.setdefault(name, {"value": [], "low": [], "high": []})
            for key in line:
                line[key].append(found["loss"][key])
    width = curve_steps / STEPS_PER_SECOND / 60
    return {"minutes": [width * (index + 0.5) for index in range(points)], "lines": lines}


def _item(segment: Segment, index: int, values: Values, overall: dict[str, Sums]) -> dict[str, Any]:
    first = next(iter(values.values()))[index]
    conditions = {}
    for name, sums in overall.items():
        found = means(sums.nats[index], sums.weights[index])
        conditions[name] = {measure: float(found[measure]) for measure in MEASURES}
        conditions[name]["per_codebook"] = np.asarray(found["per_codebook"]).tolist()
    return {
        "path": str(segment.path),
        "first_step": segment.first_step,
        "steps": first["steps"],
        "conditions": conditions,
    }
