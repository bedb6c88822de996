"""Watches the fast weights of a model that streams: lines of JSON every n steps, and a plot, live or afterwards.

    with Recorder(lm_gen, "memory.jsonl", every=25):
        ...                                             # lm_gen.step(...), for hours
    python -m moshi_patch.recorder memory.jsonl memory.png [--follow 10]

Steps are counted in Python; the device is asked, and waited for, at every n-th step alone.

Shapes: `B` rows of the stream.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from .model import require_gatings, ttt_stats

STEP_METHODS = ("step", "step_with_extra_heads", "forward_text")
"""Methods that move a stream on: those of `LMGen`, which replays a graph, or else that of `LMModel`."""

FIELD_OF_EVENT = {"start": "chunk_size", "read": "layers", "reset": "rows"}
"""What a line has besides its step, by its event."""


class Recorder:
    """Attaches to a streaming `LMGen` or `LMModel` and appends to a file what its fast weights do; a context manager.

    Lines are objects with `event`, `step` (of the model, since it was attached), `time` (seconds since then) and
    - `start`: also `every`, and `chunk_size` and `rows` per layer;
    - `reset`: also `rows`, a list of those that were reset, or null for all;
    - `read`: also `layers`: per layer `position` (steps since the row's reset), `updates`, `delta_norm` and
      `relative_delta`, each a list of B numbers.

    Args:
        model: to attach to. Behind replayed CUDA graphs only an `LMGen` can count its steps; an `LMModel` cannot.
        path: appended to, line by line.
        every: steps between two reads. A read allocates one delta and waits for the device.

    Raises:
        ValueError: when the model has no TTT layer, or `every` is not a positive whole number.
    """

    def __init__(self, model: nn.Module, path: str | Path, every: int = 25):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: must be a positive whole number of steps.")
        self.language_model = getattr(model, "lm_model", model)
        self.gatings = require_gatings(self.language_model)
        self.model, self.path, self.every = model, Path(path), every
        self.steps = 0
        self._begin = time.monotonic()
        self._last_read = 0
        self._wrapped: dict[str, Callable | None] = {}  # by name what the model itself had in its place, if anything

    def __enter__(self) -> "Recorder":
        self._file = _append_to(self.path)
        self._begin = time.monotonic()
        sizes = {name: gating.config.chunk_size for name, gating in self.gatings.items()}
        self._write("start", every=self.every, chunk_size=sizes)
        names = [name for name in STEP_METHODS[:2] if hasattr(self.model, name)] or [STEP_METHODS[2]]
        for name in names:
            self._wrap(name, self._stepping)
        self._wrap("reset_streaming", self._resetting)
        return self

    def __exit__(self, *_: object) -> None:
        for name, before in self._wrapped.items():
            if before is None:
                delattr(self.model, name)  # the class's own method shows again
            else:
                setattr(self.model, name, before)  # another recorder's, or a server's
        self._wrapped.clear()
        if self.steps > self._last_read and self._streaming():
            self.read()
        self._file.close()

    def read(self) -> None:
        """Writes a line now. Waits for the device."""
        self._last_read = self.steps
        layers = {}
        for name, stats in ttt_stats(self.language_model).items():
            position = self.gatings[name]._streaming_state.fast.position.tolist()
            kept = {key: stats[key] for key in ("updates", "delta_norm", "relative_delta")}
            layers[name] = {"position": position, **kept}
        self._write("read", layers=layers)

    def _wrap(self, name: str, around: Callable) -> None:
        stock = getattr(self.model, name)
        self._wrapped[name] = vars(self.model).get(name)
        setattr(self.model, name, lambda *args, **kwargs: around(stock, *args, **kwargs))

    def _stepping(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        codes = args[0] if args else next(kwargs[name] for name in ("input_tokens", "sequence") if name in kwargs)
        self.steps += codes.shape[-1]
        if self.steps // self.every > self._last_read // self.every and self._streaming():
            self.read()
        return result

    def _resetting(self, stock: Callable, reset_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        rows = None if reset_mask is None else reset_mask.nonzero()[:, 0].tolist()
        result = stock(reset_mask, *args, **kwargs)
        self._write("reset", rows=rows)
        return result

    def _streaming(self) -> bool:
        return all(gating.is_streaming for gating in self.gatings.values())

    def _write(self, event: str, **content: Any) -> None:
        line = {"event": event, "step": self.steps, "time": round(time.monotonic() - self._begin, 3), **content}
        self._file.write(json.dumps(line) + "\n")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of the newest recording in a file, in order.

    A last line that is still being written is left out, and so is one that was cut off when a recording ended.

    Raises:
        ValueError: when the file is not one of `Recorder`'s; names the line.
    """
    found = [_record(line) for line in Path(path).read_text().splitlines()]
    records: list[dict[str, Any]] = []
    for number, (record, following) in enumerate(zip(found, [*found[1:], None], strict=True), start=1):
        if record is None:
            cut_off = records and following is not None and following["event"] == "start"
            if number < len(found) and not cut_off:
                raise ValueError(f"{path}:{number}: not a line of a recording.")
            continue
        if record["event"] == "start":
            records = []
        records.append(record)
    if not records or records[0]["event"] != "start":
        raise ValueError(f"{path}: holds no recording; its first line must be a start.")
    return records


def _record(line: str) -> dict[str, Any] | None:
    """A line of a recording; None for anything else."""
    try:
        record = json.loads(line)
        return record if FIELD_OF_EVENT[record["event"]] in record and isinstance(record["step"], int) else None
    except (ValueError, TypeError, KeyError):
        return None


def _append_to(path: Path) -> TextIO:
    """The file, at the beginning of a line: a recording that was killed may have left half of one."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
    return path.open("a", buffering=1)


def plot(records: list[dict[str, Any]], path: str | Path, row: int = 0) -> None:
    """Draws delta norm and relative delta of one row, per layer, against the step; marks chunk ends and resets.

    Raises:
        ValueError: for a row that was not recorded.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    reads = [record for record in records if record["event"] == "read"]
    rows = min((len(layer["updates"]) for read in reads for layer in read["layers"].values()), default=row + 1)
    if not 0 <= row < rows:
        raise ValueError(f"row={row}: the recording has rows 0 to {rows - 1}.")
    resets = [r["step"] for r in records if r["event"] == "reset" and (r["rows"] is None or row in r["rows"])]
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, key, label in zip(
        panels, ("delta_norm", "relative_delta"), ("‖delta‖ (Frobenius)", "‖delta‖ / ‖W_down‖"), strict=True
    ):
        for name in records[0]["chunk_size"]:
            points = [(read["step"], read["layers"][name][key][row]) for read in reads]
            axes.plot(*zip(*points, strict=True) if points else ([], []), ".-", markersize=3, linewidth=1, label=name)
        for index, step in enumerate(resets):
            axes.axvline(step, color="black", linestyle="--", linewidth=1, label=None if index else "reset")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    ends = _chunk_ends(records[0], reads, row)
    if ends:
        panels[0].plot(ends, [0] * len(ends), "|", color="grey", markersize=8, label="chunk ends")
    panels[0].legend(fontsize="small")
    panels[1].set_xlabel("step of 80 ms")
    figure.suptitle(f"Fast weights of row {row}" + ("" if reads else ": nothing was read yet"))
    temporary = Path(path).with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


def _chunk_ends(start: dict[str, Any], reads: list[dict[str, Any]], row: int) -> list[int]:
    """Steps at which chunks of the first layer ended, none further back than the read before; at most some hundreds."""
    name, size = next(iter(start["chunk_size"].items()))
    ends, last = [], 0
    for read in reads:
        position = read["layers"][name]["position"][row]
        newest = read["step"] - position % size
        ends += [end for end in range(newest, last, -size) if end > read["step"] - position]
        last = read["step"]
    return sorted(ends)[:: 1 + len(ends) // 400]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moshi_patch.recorder", description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="what a Recorder wrote")
    parser.add_argument("plot", type=Path, nargs="?", help="the PNG to write (default: beside the log)")
    parser.add_argument("--row", type=int, default=0, help="of the batch (default: 0)")
    parser.add_argument("--follow", type=float, metavar="SECONDS", help="draw again every so often, until interrupted")
    args = parser.parse_args()
    target = args.plot or args.log.with_suffix(".png")
    try:
        while True:
            plot(read_records(args.log), target, args.row)
            if not args.follow:
                break
            time.sleep(args.follow)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        pass
    print(target)


if __name__ == "__main__":
    main()
