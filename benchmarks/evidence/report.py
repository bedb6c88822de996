"""The generated parts of docs/evidence.md: every table, from the results alone.

The page is written by hand around markers. `render` replaces what stands between `<!-- name -->` and
`<!-- end name -->`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from .grid import Cell
from .results import Line, Results, mean, nats, spread, values
from .settings import Settings

BLOCKS: dict[str, Callable[[Results], str]] = {}


def _block(function: Callable[[Results], str]) -> Callable[[Results], str]:
    BLOCKS[function.__name__] = function
    return function


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def render(page: str, cells: list[Cell], lines: dict[str, Line]) -> str:
    """The page with every marked part made anew.

    Raises:
        ValueError: for a marker without its end, or one whose name is not known.
    """
    results = Results(cells, lines)
    for name in re.findall(r"<!-- ([a-z_]+) -->", page):
        if name not in BLOCKS:
            raise ValueError(f"<!-- {name} -->: no such part; there are {', '.join(BLOCKS)}.")
        if f"<!-- end {name} -->" not in page:
            raise ValueError(f"<!-- {name} -->: <!-- end {name} --> is missing.")
        start = page.index(f"<!-- {name} -->") + len(f"<!-- {name} -->")
        stop = page.index(f"<!-- end {name} -->")
        page = f"{page[:start]}\n{BLOCKS[name](results)}\n{page[stop:]}"
    return page


def _three_marks(name: str, lines: list[Line], condition: str, marks: tuple[str, ...]) -> list[str]:
    return [name, *(spread(values(lines, nats(condition, mark))) for mark in marks), str(len(lines))]


@_block
def headline(results: Results) -> str:
    """Recall: the three kinds of token, the control beside it, what it costs."""
    stock, ttt = results.find("recall", model="none"), results.find("recall", model="ttt")
    longer = results.find("recall equal bytes")
    rows = []
    for name, lines, condition in (
        ("no TTT", stock, "none"),
        ("no TTT, longer attention of equal memory", longer, "none"),
        ("TTT", ttt, "on"),
        ("the same weights, updates off", ttt, "off"),
    ):
        cost = [spread(values(lines, lambda line: line["training"]["peak_bytes"] / 2**20), 0)]
        rows.append(_three_marks(name, lines, condition, ("first", "within", "beyond")) + cost)
    header = ["nats per token, mean (lowest–highest)", "first pass", "within window", "beyond window", "seeds", "MiB"]
    return table(header, rows)


@_block
def gaps(results: Results) -> str:
    """Recall by the length of the gap."""
    found = {
        "no TTT": (results.find("recall", model="none"), "none"),
        "no TTT, longer attention of equal memory": (results.find("recall equal bytes"), "none"),
        "TTT": (results.find("recall", model="ttt"), "on"),
        "the same weights, updates off": (results.find("recall", model="ttt"), "off"),
    }
    windows = (1, 2, 4, 8, 12, 16)
    rows = [
        [name, *(spread(values(lines, nats(condition, variation=f"gap {w}"))) for w in windows)]
        for name, (lines, condition) in found.items()
    ]
    return table(["nats beyond the window, gap in windows", *map(str, windows)], rows)


@_block
def capacity(results: Results) -> str:
    """Recall by the amount to remember."""
    cells = {part: results.find("capacity", part=part) for part in (16, 64, 128)}
    cells[32] = results.find("recall", model="ttt")
    rows = [
        [
            str(part),
            spread(values(cells[part], nats("on"))),
            spread(values(cells[part], nats("on", kind="hits")), 0, percent=True),
            spread(values(cells[part], nats("off"))),
            str(len(cells[part])),
        ]
        for part in sorted(cells)
    ]
    return table(["tokens to remember", "nats", "accuracy, %", "updates off", "seeds"], rows)


@_block
def associations(results: Results) -> str:
    """Accuracy by the number of pairs."""
    stock, ttt = (results.find("associations", model=model) for model in ("none", "ttt"))
    if not results.has("associations"):
        return "The grid has no cell `associations`."
    settings = results.cell_settings("associations")[0]
    rows = []
    for pairs in settings.pairs:
        row = [str(pairs)]
        for lines, condition in ((stock, "none"), (ttt, "on"), (ttt, "off")):
            row.append(spread(values(lines, nats(condition, "beyond", f"pairs {pairs}", "hits")), 0, percent=True))
        rows.append([*row, str(len(ttt))])
    chance = f"chance is {100 / (3 * settings.card // 8):.1f} %"
    return table(["pairs", f"no TTT ({chance})", "TTT", "the same weights, updates off", "seeds"], rows)


@_block
def shift(results: Results) -> str:
    """Loss before and after the rule of the stream changes."""
    found = {"no TTT": (results.find("shift", model="none"), "none")}
    found["TTT"] = (results.find("shift", model="ttt"), "on")
    found["the same weights, updates off"] = (found["TTT"][0], "off")
    for settings in results.cell_settings("shift settings") if results.has("shift settings") else []:
        found[f"TTT, decay {settings.decay}"] = (results.find("shift settings", decay=settings.decay), "on")
    times = ("before", "since_0", "since_16", "since_32", "since_64", "since_96")
    rows = [
        [name, *(spread(values(lines, nats(condition, mark))) for mark in times), str(len(lines))]
        for name, (lines, condition) in found.items()
    ]
    header = ["nats per ruled step", "32 steps before"]
    return table(
        [*header, *(f"{t.removeprefix('since_')} to {int(t[6:]) + 16} after" for t in times[1:]), "seeds"], rows
    )


ONE_AT_A_TIME = (
    "chunk", "rate", "kernel", "full convolution", "hidden states", "one layer", "one learning rate", "decay", "clip",
)  # fmt: skip


@_block
def settings(results: Results) -> str:
    """What one setting at a time does to the recall of the headline cell."""
    base = results.find("recall", model="ttt")
    base_mean = mean(values(base, nats("on")))
    rows = [
        [
            "**as in the first table**",
            "",
            spread(values(base, nats("on"))),
            spread(values(base, nats("off"))),
            "",
            str(len(base)),
        ]
    ]
    for name in ONE_AT_A_TIME:
        for chosen in results.cell_settings(name) if results.has(name) else []:
            lines = results.same(chosen)
            on = values(lines, nats("on"))
            difference = f"{mean(on) - base_mean:+.2f}" if on else "–"
            rows.append([*changed(chosen), spread(on), spread(values(lines, nats("off"))), difference, str(len(lines))])
    return table(["setting", "value", "nats beyond the window", "updates off", "difference", "seeds"], rows)


def changed(chosen: Settings) -> list[str]:
    """Name and value of the first field that differs from the defaults."""
    plain = Settings()
    names = {"chunk": "C", "rate": "η", "kernel": "K", "ttt_layers": "only layer", "target_lr": "target_lr"}
    for field in dataclasses.fields(Settings):
        value = getattr(chosen, field.name)
        if field.name != "seed" and value != getattr(plain, field.name):
            return [names.get(field.name, field.name), str(value)]
    return ["", ""]


@_block
def streams(results: Results) -> str:
    """Long streams: the first and the last unit, and how the delta grew."""
    rows = []
    for cell in ("stream", "stream trained with decay"):
        for chosen in results.cell_settings(cell) if results.has(cell) else []:
            lines = results.find(cell, stream=chosen.stream, stream_decay=chosen.stream_decay)
            decay = chosen.decay if chosen.stream_decay is None else chosen.stream_decay
            row = [str(chosen.stream), f"{decay}" + (", trained with it" if chosen.stream_decay is None else "")]
            for place in (0, -1):
                row.append(spread(values(lines, lambda line, p=place: line["stream"]["on"][p]["beyond"])))
            row.append(spread(values(lines, lambda line: line["stream"]["off"][-1]["beyond"])))
            for place in (0, -1):
                row.append(spread(values(lines, lambda line, p=place: mean(line["stream"]["on"][p]["relative_delta"]))))
            row.append(spread(values(lines, lambda line: line["stream"]["on"][-1]["entropy"])))
            rows.append([*row, str(len(lines))])
    header = ["filler", "decay", "nats, first unit", "last unit", "updates off, last"]
    return table([*header, "relative delta, first", "last", "entropy, last", "seeds"], rows)


@_block
def speech(results: Results) -> str:
    """Real recordings."""
    stock, ttt = (results.find("speech", model=model) for model in ("none", "ttt"))
    rows = []
    for variation, name in (
        ("", "held-out dialogue"),
        ("held out, renamed", "the same, codes renamed"),
        ("trained on", "training dialogues"),
    ):
        for lines, condition, model in (
            (stock, "none", "no TTT"),
            (ttt, "on", "TTT"),
            (ttt, "off", "TTT, updates off"),
        ):
            marks = [spread(values(lines, nats(condition, mark, variation))) for mark in ("first", "beyond")]
            hits = spread(values(lines, nats(condition, "beyond", variation, "hits")), 0, percent=True)
            rows.append([name, model, *marks, hits, str(len(lines))])
    return table(["evaluated on", "model", "nats, first pass", "nats, returned", "accuracy returned, %", "seeds"], rows)


@_block
def continued(results: Results) -> str:
    """A trained stock model that is taught on."""
    find = results.find
    found = [
        ("the stock model itself", find("base"), "none"),
        ("all weights, no TTT", find("continued", model="none", trained="full"), "none"),
        ("all weights, no TTT, longer attention of equal memory", find("continued equal bytes"), "none"),
        ("LoRA only", find("continued", model="none", trained="lora"), "none"),
        ("all weights and TTT", find("continued", model="ttt", trained="full"), "on"),
        ("the same weights, updates off", find("continued", model="ttt", trained="full"), "off"),
        ("LoRA and TTT", find("continued", model="ttt", trained="lora"), "on"),
        ("the same weights, updates off", find("continued", model="ttt", trained="lora"), "off"),
    ]
    rows = [_three_marks(name, lines, condition, ("first", "within", "beyond")) for name, lines, condition in found]
    return table(["nats per token", "first pass", "within window", "beyond window", "seeds"], rows)


@_block
def audio(results: Results) -> str:
    """Recall of the text row while an audio row says something random."""
    rows = []
    for model, condition, name in (
        ("none", "none", "no TTT"),
        ("ttt", "on", "TTT"),
        ("ttt", "off", "the same weights, updates off"),
    ):
        rows.append(
            _three_marks(name, results.find("random audio", model=model), condition, ("first", "within", "beyond"))
        )
    return table(["nats per token", "first pass", "within window", "beyond window", "seeds"], rows)


@_block
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
