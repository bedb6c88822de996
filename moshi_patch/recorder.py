"""Watches the fast weights of a model that streams: lines of JSON every n steps, and a plot, live or afterwards.

    recorder = Recorder(lm_gen, "memory.jsonl", every=25)   # from now on; `with Recorder(...)` closes it at the end
    ...                                                     # lm_gen.step(...), for hours
    recorder.close()
    python -m moshi_patch.recorder memory.jsonl memory.png [--follow 10]

Steps are counted in Python; the device is asked, and waited for, at every n-th step alone.

Shapes: `B` rows of the stream.
"""

import argparse
import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import nn

from .model import require_memories, ttt_stats

logger = logging.getLogger(__name__)

STEP_METHODS = ("step", "step_with_extra_heads", "forward_text")
"""Methods that move a stream on: those of `LMGen`, which replays a graph, or else that of `LMModel`."""

PANELS = {
    "delta_norm": "‖delta‖ (Frobenius)",
    "relative_delta": "‖delta‖ / ‖what it began as‖",
    "known": "share of the chunk's\ntargets that was known",
}

READ = ("position", "updates", "delta_norm", "relative_delta")
"""What is read of a layer: each a list with a number per row."""


class Recorder:
    """Appends to a file what the fast weights of a streaming `LMGen` or `LMModel` do, from its construction on.

    It records until :meth:`close`, also as a context manager, or until the process ends. When the file cannot be
    written any more, an error is logged and the model goes on unrecorded.

    Lines are objects with `event`, `step` (of the model, since it was attached), `time` (seconds since then) and
    - `start`: also `every`, and `chunk_size` per layer;
    - `reset`: also `rows`, a list of those that were reset, or null for all;
    - `read`: also `layers`: per layer `position` (steps since the row's reset), `updates`, `delta_norm` and
      `relative_delta`, each a list of B numbers; with the residual update `known` too, null before a chunk has ended.

    Args:
        model: to attach to. Behind replayed CUDA graphs only an `LMGen` can count its steps; an `LMModel` cannot.
        path: appended to, line by line.
        every: steps between two reads. A read allocates one delta and waits for the device.

    Raises:
        ValueError: when the model has no TTT layer, or `every` is not a positive whole number.
        OSError: when the file cannot be written.
    """

    def __init__(self, model: nn.Module, path: str | Path, every: int = 25):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: must be a positive whole number of steps.")
        self.language_model = getattr(model, "lm_model", model)
        self.memories = require_memories(self.language_model)
        self.model, self.path, self.every = model, Path(path), every
        self.steps = 0
        self._last_read = 0
        self._file: TextIO | None = _append_to(self.path)
        self._begin = time.monotonic()
        self._wrapped: dict[str, tuple[Callable, Callable | None]] = {}  # by name: ours, and the model's own before it
        self._write("start", every=every, chunk_size={name: m.update_steps for name, m in self.memories.items()})
        if self._file is None:
            raise OSError(f"{self.path}: cannot be written.")
        for name in [name for name in STEP_METHODS[:2] if hasattr(model, name)] or [STEP_METHODS[2]]:
            self._wrap(name, self._stepping)
        self._wrap("reset_streaming", self._resetting)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Writes what was not read yet, closes the file and leaves the model as it was. Closing again does nothing."""
        if self._file is None:
            return
        if self.steps > self._last_read and self._streaming():
            self.read()
        self._detach()

    def read(self) -> None:
        """Writes a line now. Waits for the device."""
        self._last_read = self.steps
        layers = {}
        for name, stats in ttt_stats(self.language_model).items():
            position = self.memories[name]._streaming_state.fast.position.tolist()
            known = {} if stats["known"] is None else {"known": stats["known"]}
            layers[name] = {"position": position, **{key: stats[key] for key in READ[1:]}, **known}
        self._write("read", layers=layers)

    def _wrap(self, name: str, around: Callable) -> None:
        stock = getattr(self.model, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if self._file is None:  # closed, below a recorder that was attached later
                return stock(*args, **kwargs)
            return around(stock, *args, **kwargs)

        self._wrapped[name] = recorded, vars(self.model).get(name)
        setattr(self.model, name, recorded)

    def _detach(self) -> None:
        for name, (recorded, before) in self._wrapped.items():
            if vars(self.model).get(name) is not recorded:
                continue  # another recorder's stands above ours and still calls it
            if before is None:
                delattr(self.model, name)  # the class's own method shows again
            else:
                setattr(self.model, name, before)  # another recorder's, or a server's
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

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
        return all(memory.is_streaming for memory in self.memories.values())

    def _write(self, event: str, **content: Any) -> None:
        line = {"event": event, "step": self.steps, "time": round(time.monotonic() - self._begin, 3), **content}
        if self._file is None:
            raise ValueError(f"{self.path}: this recorder is closed.")
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as error:
            logger.error("%s: recording ends, as it cannot be written (%s).", self.path, error.strerror or error)
            with contextlib.suppress(OSError):  # what is still in its buffer
                self._detach()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The lines of the newest recording in a file, in order.

    A last line that is still being written is left out, and so is one that was cut off when a recording ended.

    Raises:
        ValueError: when the file is not one of `Recorder`'s; names the line.
    """
    found = [_record(line) for line in Path(path).read_bytes().splitlines()]
    records: list[dict[str, Any]] = []
    for number, (record, following) in enumerate(zip(found, [*found[1:], None], strict=False), start=1):
        if record is None:
            cut_off = records and following is not None and following["event"] == "start"
            if number < len(found) and not cut_off:
                raise ValueError(f"{path}:{number}: not a line of a recording.")
            continue
        if record["event"] == "start":
            records = []
        elif records and record["event"] == "read" and record["layers"].keys() != records[0]["chunk_size"].keys():
            raise ValueError(f"{path}:{number}: its layers are not those that the recording started with.")
        records.append(record)
    if not records or records[0]["event"] != "start":
        raise ValueError(f"{path}: holds no recording; its first line must be a start.")
    return records


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of a recording; None for anything else."""
    try:
        record = json.loads(line)
        event = record["event"]
        whole = isinstance(record["step"], int) and (
            (event == "start" and min(record["chunk_size"].values()) > 0)
            or (event == "reset" and (record["rows"] is None or all(row >= 0 for row in record["rows"])))
            or (event == "read" and all(_is_read(layer) for layer in record["layers"].values()))
        )
        return record if whole else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _is_read(layer: dict[str, list[float]]) -> bool:
    rows = len(layer["updates"])
    known = [0.0 if share is None else share for share in layer.get("known", [None] * rows)]
    lists = [*(layer[key] for key in READ), known]
    return all(len(values) == rows and all(isinstance(value, (int, float)) for value in values) for values in lists)


def _append_to(path: Path) -> TextIO:
    """The file, at the beginning of a line: a recording that was killed may have left half of one."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                file.write(b"\n")
    return path.open("a", buffering=1)


def plot(records: list[dict[str, Any]], path: str | Path, row: int = 0) -> None:
    """Draws what was read of one row, per layer, against the step; marks chunk ends and resets.

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
    keys = [key for key in PANELS if key in READ or any(key in layer for r in reads for layer in r["layers"].values())]
    figure = Figure(figsize=(10, 3 * len(keys)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(keys), 1, sharex=True)
    for axes, key in zip(panels, keys, strict=True):
        for name in records[0]["chunk_size"]:
            values = [(read["step"], read["layers"][name].get(key, [None] * rows)[row]) for read in reads]
            points = [(step, value) for step, value in values if value is not None]
            axes.plot(*zip(*points, strict=True) if points else ([], []), ".-", markersize=3, linewidth=1, label=name)
        for index, step in enumerate(resets):
            axes.axvline(step, color="black", linestyle="--", linewidth=1, label=None if index else "reset")
        axes.set_ylabel(PANELS[key])
        axes.grid(alpha=0.3)
    ends = _chunk_ends(records[0], reads, row)
    if ends:
        panels[0].plot(ends, [0] * len(ends), "|", color="grey", markersize=8, label="chunk ends")
    panels[0].legend(fontsize="small")
    panels[-1].set_xlabel("step of 80 ms")
    figure.suptitle(f"Fast weights of row {row}" + ("" if reads else ": nothing was read yet"))
    temporary = Path(path).with_suffix(".tmp.png")
    try:
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def main(argv: Sequence[str] | None = None) -> None:
    """Draws a recording, once or again and again.

    Raises:
        SystemExit: with code 2 for arguments that make no sense, 1 for a file that cannot be drawn; one line each.
    """
    parser = argparse.ArgumentParser(prog="python -m moshi_patch.recorder", description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="what a Recorder wrote")
    parser.add_argument("plot", type=Path, nargs="?", help="the PNG to write (default: beside the log)")
    parser.add_argument("--row", type=int, default=0, help="of the batch (default: 0)")
    parser.add_argument("--follow", type=float, metavar="SECONDS", help="draw again every so often, until interrupted")
    args = parser.parse_args(argv)
    if args.follow is not None and not 0 <= args.follow < 1e6:
        parser.error(f"argument --follow: {args.follow}: must be seconds, 0 or more")
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
