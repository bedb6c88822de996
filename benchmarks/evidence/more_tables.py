"""The tables about long streams, taught-on models and audio, and the list of what was run."""

from collections.abc import Callable
from typing import Any

from .blocks import block, gap_table, table, three_marks
from .results import Line, Results, mean, spread, values

STREAM_CELLS = {
    "stream": "as in the first table",
    "stream trained with decay": "trained with decay 0.9",
    "stream with clip": "trained and streamed with clip 10",
    "stream trained with silence": "half the training gaps silent",
    "stream trained with long gaps": "training gaps up to 24 windows",
    "stream taught on": "taught on with η 0.01, 1200 steps (section 7)",
    "stream taught on with long gaps": "the same, training gaps up to 12 windows",
}
"""Cells of long streams, and how their models were trained."""

KINDS = ("fresh", "silence", "own")


@block
def streams(results: Results) -> str:
    """Long streams: the loss in the first and in the last unit."""
    rows = _stream_rows(results, lambda line, place: line["stream"]["on"][place]["beyond"])
    off = [spread(values(results.find("stream", stream=k, stream_decay=1.0), _last_off)) for k in KINDS]
    rows.append(
        [
            "updates off",
            "",
            "",
            off[0],
            "",
            off[1],
            "",
            off[2],
            str(len(results.find("stream", stream="own", stream_decay=1.0))),
        ]
    )
    return table(_stream_header("nats beyond the window"), rows)


@block
def deltas(results: Results) -> str:
    """Long streams: the norm of the delta over that of W_down, the mean of the layers."""
    rows = _stream_rows(results, lambda line, place: mean(line["stream"]["on"][place]["relative_delta"]))
    return table(_stream_header("relative delta"), rows)


@block
def own_samples(results: Results) -> str:
    """Streams of the model's own samples: how sure it is of them, and what that costs on what is new."""
    rows = []
    for cell, name in STREAM_CELLS.items():
        chosen = results.cell_settings(cell) if results.has(cell) else []
        for decay in [d for d in dict.fromkeys(settings.stream_decay for settings in chosen) if d in (1.0, 0.9)]:
            lines = results.find(cell, stream="own", stream_decay=decay)
            row = [name, str(decay)]
            for condition, pick in (
                ("on", lambda found: found[0]),
                ("on", min),
                ("on", lambda found: found[-1]),
                ("off", min),
            ):
                row.append(spread(values(lines, lambda line, c=condition, p=pick: p(_each(line, c, "entropy")))))
            row.append(spread(values(lines, lambda line: _each(line, "on", "first")[-1])))
            rows.append([*row, str(len(lines))])
    header = ["entropy of its samples, nats", "decay", "first unit", "lowest", "last", "updates off, lowest"]
    return table([*header, "loss on new parts, last", "seeds"], rows)


def _each(line: Line, condition: str, name: str) -> list[float]:
    return [point[name] for point in line["stream"][condition]]


def _last_off(line: Line) -> float:
    return line["stream"]["off"][-1]["beyond"]


def _stream_header(what: str) -> list[str]:
    return [what, "decay", *(f"{kind}, {place}" for kind in KINDS for place in ("first", "last")), "seeds"]


def _stream_rows(results: Results, read: Callable[[Line, int], float]) -> list[list[str]]:
    rows = []
    for cell, name in STREAM_CELLS.items():
        chosen = results.cell_settings(cell) if results.has(cell) else []
        for decay in dict.fromkeys(settings.stream_decay for settings in chosen):
            row = [name, str(chosen[0].decay if decay is None else decay)]
            seeds = 0
            for kind in KINDS:
                lines = results.find(cell, stream=kind, stream_decay=decay)
                seeds = max(seeds, len(lines))
                row += [spread(values(lines, lambda line, p=place: read(line, p))) for place in (0, -1)]
            rows.append([*row, str(seeds)])
    return rows


CONTINUED: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("all weights, no TTT", "continued", {"model": "none", "trained": "full"}),
    ("all weights, no TTT, attention of equal memory", "continued equal bytes", {"model": "none"}),
    ("LoRA, no TTT", "continued", {"model": "none", "trained": "lora"}),
    ("all weights and TTT, η 1", "continued", {"model": "ttt", "trained": "full"}),
    ("all weights and TTT, η 0.1", "continued rate", {"rate": 0.1}),
    ("all weights and TTT, η 0.01", "continued rate", {"rate": 0.01}),
    ("all weights and TTT, η 0.001", "continued rate", {"rate": 0.001}),
    ("all weights and TTT, η 1, clip 1", "continued clip", {}),
    ("LoRA and TTT, η 1", "continued", {"model": "ttt", "trained": "lora"}),
    ("LoRA and TTT, η 0.01", "continued adapters", {}),
    ("quarter learning rates: all weights, no TTT", "continued gently", {"model": "none"}),
    ("quarter learning rates: and TTT, η 1", "continued gently", {"model": "ttt"}),
    ("quarter learning rates: and TTT, η 0.1", "continued gently, small rate", {}),
    ("1200 steps: all weights, no TTT", "continued longer without", {"model": "none"}),
    ("1200 steps: all weights, no TTT, attention of equal memory", "continued longer equal bytes", {"model": "none"}),
    ("1200 steps: all weights and TTT, η 1", "continued longer", {"rate": 1.0}),
    ("1200 steps: all weights and TTT, η 0.01", "continued longer", {"rate": 0.01}),
    ("1200 steps: LoRA and TTT, η 0.01", "continued adapters longer", {}),
)
"""Rows of the table below: name, cell, and which of its runs."""


@block
def continued(results: Results) -> str:
    """A trained stock model that is taught on."""
    find = results.find
    found = [("the stock model itself, not taught on", find("base"), "none")]
    for name, cell, chosen in CONTINUED:
        lines = find(cell, **chosen)
        found.append((name, lines, "on" if chosen.get("model", "ttt") == "ttt" else "none"))
        if cell in ("continued", "continued longer") and chosen.get("model") != "none":
            found.append(("the same weights, updates off", lines, "off"))
    rows = [three_marks(name, lines, condition, ("first", "within", "beyond")) for name, lines, condition in found]
    return table(["nats per token", "first pass", "within window", "beyond window", "seeds"], rows)


@block
def continued_gaps(results: Results) -> str:
    """The longest taught-on models by the length of the gap."""
    ttt = results.find("continued longer by gap")
    found = {"no TTT, attention of equal memory": (results.find("continued longer equal bytes"), "none")}
    return gap_table(found | {"TTT, η 0.01": (ttt, "on"), "the same weights, updates off": (ttt, "off")})


@block
def audio(results: Results) -> str:
    """Recall of the text row while an audio row says something random."""
    rows = []
    for model, condition, name in (
        ("none", "none", "no TTT"),
        ("ttt", "on", "TTT"),
        ("ttt", "off", "the same weights, updates off"),
    ):
        rows.append(
            three_marks(name, results.find("random audio", model=model), condition, ("first", "within", "beyond"))
        )
    return table(["nats per token", "first pass", "within window", "beyond window", "seeds"], rows)


@block
def bookkeeping(results: Results) -> str:
    """How many runs, on what, how long; what diverged, failed or was left out."""
    lines = list(results.lines.values())
    if not lines:
        return "No run yet."
    machines: dict[str, Any] = {}
    for line in lines:
        used = line["machine"]
        text = f"{used['cpu']}, {used['cores']} cores, {used['threads']} thread(s), torch {used['torch']}, "
        text += f"moshi {used['moshi']}, {used['date']}"
        machines[text] = machines.get(text, 0) + 1
    told = [f"{len(lines)} runs, {sum(line['seconds'] for line in lines) / 60:.0f} minutes."]
    told += [f"{count} on {text}." for text, count in machines.items()]
    for line in results.not_ok():
        told.append(f"Cell `{line['cell']}`, seed {line['settings']['seed']}: {line['status']}, {line['message']}.")
    missing = results.missing()
    told.append(
        "Left out, runs of a cell: " + ", ".join(f"`{cell}` {count}" for cell, count in missing.items()) + "."
        if missing
        else "Every run of the grid is there."
    )
    return "\n".join(f"- {entry}" for entry in told)
