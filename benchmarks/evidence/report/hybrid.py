"""The tables about TTT-MLP (`ttt_kind="mlp"`): beside In-Place TTT, no TTT, and attention of equal bytes."""

import functools
import json
from pathlib import Path

from ..grid import read_grid
from ..results import Line, Results, mean, nats, spread, values
from ..store import Store
from .blocks import block, table
from .streams import HEARD

HERE = Path(__file__).parents[1]
RATES = (1.0, 0.1, 0.05)
TASKS = ("recall", "associations", "shift")


@functools.cache
def _others() -> Results:
    """The runs of docs/evidence.md: no TTT, and In-Place TTT, on the same sequences."""
    return Results(read_grid(HERE / "grids" / "evidence.yaml"), Store(HERE.parent / "results" / "evidence.jsonl").runs)


def _mlp(results: Results, task: str, rate: float) -> list[Line]:
    """Runs of a task at one `base_lr`."""
    lines = [*results.find(task), *results.find(f"{task}, 0.1")]
    return [line for line in lines if dict(line["settings"]["ttt"])["base_lr"] == rate]


def _models(results: Results, task: str) -> dict[str, tuple[list[Line], str]]:
    """Of a task, by the name in a table, the runs and the condition."""
    others = _others()
    found = {
        "no TTT": (others.find(task, model="none"), "none"),
        "attention of equal bytes": (results.find(f"{task} equal bytes"), "none"),
        "In-Place TTT": (others.find(task, model="ttt"), "on"),
    }
    for rate in RATES:
        found[f"TTT-MLP, base_lr {rate:g}"] = (_mlp(results, task, rate), "on")
    for rate in RATES:
        found[f"the same weights, updates off, base_lr {rate:g}"] = (_mlp(results, task, rate), "off")
    return found


@block
def hybrid_recall(results: Results) -> str:
    """Recall: the three kinds of token, and what a training step keeps."""
    rows = []
    for name, (lines, condition) in _models(results, "recall").items():
        marks = [spread(values(lines, nats(condition, mark))) for mark in ("first", "within", "beyond")]
        cost = spread(values(lines, lambda line: line["training"]["peak_bytes"] / 2**20), 0)
        rows.append([name, *marks, str(len(lines)), cost])
    return table(["nats per token", "first pass", "within window", "beyond window", "seeds", "MiB"], rows)


@block
def hybrid_pairs(results: Results) -> str:
    """Accuracy by the number of pairs."""
    rows = []
    for name, (lines, condition) in _models(results, "associations").items():
        read = [nats(condition, "beyond", f"pairs {pairs}", "hits") for pairs in (4, 8, 16, 32)]
        rows.append([name, *(spread(values(lines, one), 0, percent=True) for one in read), str(len(lines))])
    return table(["accuracy, %, chance 2.8", *(f"{pairs} pairs" for pairs in (4, 8, 16, 32)), "seeds"], rows)


@block
def hybrid_shift(results: Results) -> str:
    """Loss before and after the rule of the stream changes."""
    times = ("before", "since_0", "since_32", "since_96")
    rows = [
        [name, *(spread(values(lines, nats(condition, mark))) for mark in times), str(len(lines))]
        for name, (lines, condition) in _models(results, "shift").items()
    ]
    header = ["nats per ruled step", "32 steps before", "0 to 16 after", "32 to 48 after", "96 to 112 after", "seeds"]
    return table(header, rows)


@block
def hybrid_streams(results: Results) -> str:
    """Streams of 52 windows: the loss in the first and in the last unit."""
    rows = []
    for rate in (1.0, 0.05):
        row, seeds = [f"TTT-MLP, base_lr {rate:g}"], 0
        for heard in HEARD:
            lines = results.find(f"stream at {rate:g}", stream=heard)
            seeds = max(seeds, len(lines))
            row += [spread(values(lines, _beyond(place))) for place in (0, -1)]
        rows.append([*row, str(seeds)])
    row = ["In-Place TTT, no decay"]
    for heard in HEARD:
        lines = _others().find("stream", stream=heard, stream_decay=1.0)
        row += [spread(values(lines, _beyond(place))) for place in (0, -1)]
    rows.append([*row, str(len(lines))])
    header = [f"{heard}, {place}" for heard in HEARD for place in ("first", "last")]
    return table(["nats beyond the window", *header, "seeds"], rows)


def _beyond(place: int):
    return lambda line: line["stream"]["on"][place]["beyond"]


@block
def hybrid_cost(results: Results) -> str:
    """Processor time of a training step of recall beside that of the model without TTT, and bytes of a row."""
    found = {name: entry for name, entry in _models(results, "recall").items() if entry[1] != "off"}
    rows = []
    for name, (lines, _) in found.items():
        times = values(lines, lambda line: 1e3 * line["training"]["cpu_seconds"] / line["settings"]["steps"])
        rows.append([name, spread(times, 0), f"{STATE_BYTES[name.split(',')[0]]:,}", str(len(lines))])
    return table(["recall", "ms of a processor per training step", "bytes per row and layer", "seeds"], rows)


def _state_bytes(context: int, heads: int = 4, width: int = 64, size: int = 16) -> dict[str, int]:
    """By model, what a row keeps in a layer beyond the window of 16 steps, four bytes a value."""
    head, hidden = width // heads, 21 * width // 8
    mlp = heads * ((head + 1) * 4 * head + (4 * head + 1) * head + 2 * size * (10 * head + 2))
    in_place = width * hidden + 2 * size * (hidden + width)
    return {
        "no TTT": 0,
        "attention of equal bytes": 4 * 2 * width * context,
        "In-Place TTT": 4 * in_place,
        "TTT-MLP": 4 * mlp,
    }


STATE_BYTES = _state_bytes(context=228)


@block
def hybrid_learnt(results: Results) -> str:
    """What was registered before the runs: learnt or not."""
    rows = []
    for rate in RATES:
        row = [f"{rate:g}"]
        for task in TASKS:
            lines = _mlp(results, task, rate)
            row.append(_judged(task, lines, _others().find(task, model="none")) if lines else "not run")
        rows.append(row)
    return table(["base_lr", "recall", "pairs", "changing rules"], rows)


@block
def hybrid_alone(results: Results) -> str:
    """One layer and nothing else, see `layer_alone`."""
    runs = json.loads((HERE.parent / "results" / "layer_alone.json").read_text())["runs"]
    rows = []
    for rate in RATES:
        chosen = [run for run in runs if run["base_lr"] == rate]
        rows.append([f"{rate:g}", *(spread([run[key] for run in chosen]) for key in ("on", "off")), str(len(chosen))])
    return table(["base_lr", "nats per value, chance 3.47", "the same weights, updates off", "seeds"], rows)


def _judged(task: str, lines: list[Line], without: list[Line]) -> str:
    """By the rules of the page: what is gained over no TTT in nats, or the accuracy at 4 pairs."""
    if task == "associations":
        hits = mean(values(lines, nats("on", "beyond", "pairs 4", "hits")))
        return f"{'learnt' if hits > 1 / 36 + 0.1 else 'not learnt'} ({100 * hits:.0f} %)"
    mark = "beyond" if task == "recall" else "before"
    gain = mean(values(without, nats("none", mark))) - mean(values(lines, nats("on", mark)))
    return f"{'learnt' if gain >= 0.1 else 'not learnt'} ({gain:+.2f})"
