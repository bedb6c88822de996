"""What the terminal and a model card show of the benchmarks: who won, a table, and what its numbers mean."""

from collections.abc import Mapping
from typing import Any

from ...common.tables import columns
from ..conditions import BASELINE, BENEFIT, MEANINGS, ON, difference_name, is_difference
from ..statistics import TOO_FEW
from ..verdict import NO_CONTROL, compared, is_clear

Results = Mapping[str, Mapping[str, Any]]
"""By data set, what `PairScores.summary` or `LongScores.summary` returned."""


def benchmark_page(results: Results) -> str:
    """Who won, the table and its notes."""
    return "\n".join([*benchmark_verdict(results), "", columns(*table(results)), *notes(results)])


def benchmark_verdict(results: Results) -> list[str]:
    """A sentence for each set, against the control or the baseline; and whether there was a control."""
    sentences, names = [], names_in(next(iter(results.values())))
    for name, result in results.items():
        place = result["up_to"][-1] if result.get("up_to") else result
        for key, other in ((BENEFIT, "trained without TTT"), (difference_name(names[0], BASELINE), "the baseline")):
            if key in place:
                sentences.append(f"{name}: {_judged(place, key, other)}.")
    if names[0] == ON and BENEFIT not in names:
        sentences.append(NO_CONTROL)
    return sentences


def notes(results: Results) -> list[str]:
    """What the numbers of the table mean, and how many recordings could not be used; a sentence or two each."""
    lines, names = [], list(dict.fromkeys(name for result in results.values() for name in names_in(result)))
    pairs = [result for result in results.values() if "pairs" in result]
    if pairs:
        lines.append(f"Pairs, by {pairs[0]['meaning']['length_normalisation']}. Chance is 0.5.")
    lines.append(f"Counted is {next(iter(results.values()))['meaning']['codebooks']}. In brackets 95 % intervals.")
    if any(map(is_difference, names)):
        lines.append("Differences are of errors (1 - accuracy) and of nats: negative is better.")
    lines += [f"{name}: {MEANINGS[name]}." for name in names if name in MEANINGS]
    for name, result in results.items():
        if result["skipped"]:
            lines.append(f"{name}: {len(result['skipped'])} skipped.")
    return lines


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of text: set, what of it, number of pairs or files, then a column per condition."""
    names = list(dict.fromkeys(name for result in results.values() for name in names_in(result)))
    rows = []
    for name, result in results.items():
        if "buckets" in result:
            for bucket in result["buckets"]:
                place = f"{bucket['from_seconds']:g}-{bucket['to_seconds']:g} s, nats per step"
                rows.append([name, place, str(bucket["files"]), *(_cell(bucket, key, 4) for key in names)])
            continue
        rows.append([name, "accuracy", str(result["pairs"]), *(_cell(result, key, 3) for key in names)])
        beyond = result.get("beyond_first_chunk")
        if beyond is not None:
            cells = (f"{beyond[key]:.3f}" if key in beyond else "" for key in names)
            rows.append([name, "of them beyond TTT's first chunk", str(beyond["pairs"]), *cells])
    return ["set", "", "number", *names], rows


def names_in(result: Mapping[str, Any]) -> list[str]:
    """The conditions and their differences that a result has numbers of."""
    place = result["buckets"][0] if result.get("buckets") else result
    return [name for name, value in place.items() if isinstance(value, Mapping) and "low" in value]


def _cell(place: Mapping[str, Any], name: str, digits: int) -> str:
    """`0.731 [0.702, 0.760]`, with a sign for a difference."""
    if name not in place:
        return ""
    form = f"{'+' if is_difference(name) else ''}.{digits}f"
    value, low, high = (place[name][key] for key in ("value", "low", "high"))
    return f"{value:{form}}" + ("" if low is None else f" [{low:{form}}, {high:{form}}]")


def _judged(place: Mapping[str, Any], key: str, other: str) -> str:
    """`won, 3.3 points fewer errors than trained without TTT (95 % interval -5.1 to -1.5)`; or in nats, to a length."""
    found = place[key]
    judgement = ("won" if found["value"] < 0 else "lost") if is_clear(found) else "not told from chance"
    if "seconds" in place:
        return f"{judgement}, up to {place['seconds']:g} s {compared(found, other)}"
    value, low, high = (None if found[bound] is None else 100 * found[bound] for bound in ("value", "low", "high"))
    words = f"{abs(value):.1f} points {'fewer' if value < 0 else 'more'} errors than {other}"
    spread = TOO_FEW if low is None else f"95 % interval {low:+.1f} to {high:+.1f}"
    return f"{judgement}, {words if value else f'as many errors as {other}'} ({spread})"
