"""The tables about long streams: what is forgotten, how the deltas grow, how sure the model becomes of itself."""

from collections.abc import Callable

from ..results import Line, Results, mean, spread, values
from ..settings import STREAMS
from .blocks import block, table

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

HEARD = STREAMS[1:]
"""What a stream hears between the parts that return, as in `Settings.stream`."""


@block
def streams(results: Results) -> str:
    """Long streams: the loss in the first and in the last unit."""
    rows = _stream_rows(results, lambda line, place: line["stream"]["on"][place]["beyond"])
    off = [spread(values(results.find("stream", stream=heard, stream_decay=1.0), _last_off)) for heard in HEARD]
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
    return [what, "decay", *(f"{heard}, {place}" for heard in HEARD for place in ("first", "last")), "seeds"]


def _stream_rows(results: Results, read: Callable[[Line, int], float]) -> list[list[str]]:
    rows = []
    for cell, name in STREAM_CELLS.items():
        chosen = results.cell_settings(cell) if results.has(cell) else []
        for decay in dict.fromkeys(settings.stream_decay for settings in chosen):
            row = [name, str(chosen[0].decay if decay is None else decay)]
            seeds = 0
            for heard in HEARD:
                lines = results.find(cell, stream=heard, stream_decay=decay)
                seeds = max(seeds, len(lines))
                row += [spread(values(lines, lambda line, p=place: read(line, p))) for place in (0, -1)]
            rows.append([*row, str(seeds)])
    return rows
