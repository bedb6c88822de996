"""What the terminal and a model card show of the benchmarks: a table, and what its numbers mean."""

from typing import Any

from ...common.tables import columns


def text(results: dict[str, dict[str, Any]]) -> str:
    """The table and its notes."""
    return "\n".join([columns(*table(results)), *notes(results)])


def notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """What the numbers of the table mean, and how many recordings could not be used; a sentence or two each."""
    lines = []
    pairs = [result for result in results.values() if "pairs" in result]
    if pairs:
        lines.append(f"Pairs, by {pairs[0]['meaning']['length_normalisation']}. Chance is 0.5.")
    lines.append(f"Counted is {next(iter(results.values()))['meaning']['codebooks']}. In brackets 95 % intervals.")
    for name, result in results.items():
        if result["skipped"]:
            lines.append(f"{name}: {len(result['skipped'])} skipped, named in eval.json.")
    return lines


def table(results: dict[str, dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of text: set, what of it, number of pairs or files, then a column per condition."""
    names = list(dict.fromkeys(name for result in results.values() for name in conditions_in(result)))
    rows = []
    for name, result in results.items():
        if "buckets" in result:
            for bucket in result["buckets"]:
                place = f"{bucket['from_seconds']:g}-{bucket['to_seconds']:g} s, nats per step"
                rows.append([name, place, str(bucket["files"]), *(_cell(bucket.get(key), ".4f") for key in names)])
            continue
        rows.append([name, "accuracy", str(result["pairs"]), *(_cell(result.get(key), ".3f") for key in names)])
        beyond = result.get("beyond_first_chunk")
        if beyond is not None:
            cells = (f"{beyond[key]:.3f}" if key in beyond else "" for key in names)
            rows.append([name, "of them beyond TTT's first chunk", str(beyond["pairs"]), *cells])
    return ["set", "", "number", *names], rows


def conditions_in(result: dict[str, Any]) -> list[str]:
    place = result["buckets"][0] if result.get("buckets") else result
    return [name for name, value in place.items() if isinstance(value, dict) and "low" in value]


def _cell(value: dict[str, float | None] | None, digits: str) -> str:
    """`0.731 [0.702, 0.760]`."""
    if value is None:
        return ""
    bounds = "" if value["low"] is None else f" [{value['low']:{digits}}, {value['high']:{digits}}]"
    return f"{value['value']:{digits}}{bounds}"
