"""What a run shows of itself: lines of JSON, tensorboard, Weights & Biases if wanted, and one picture at the end."""

import json
import logging
import math
import os
import re
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.disk import writing
from ..common.errors import ConfigError
from ..common.files import parse_object, read_json_lines, write_whole
from ..settings.record import to_dict
from ..settings.schema import TrainArgs

if TYPE_CHECKING:
    from ..common.distributed import Context

__all__ = ["Monitor", "read_metrics"]

logger = logging.getLogger(__name__)

RELATIVE_DELTA = re.compile(r"ttt/(.+)/relative_delta")


class Monitor:
    """Writes the metrics of a run on rank 0; on other ranks every method does nothing.

    `metrics.train.jsonl` and `metrics.eval.jsonl` in `run_dir` hold one object per line: `step`, `time` (seconds since
    1970) and the values; a value that is not finite is null. tensorboard's curves are in `run_dir/tensorboard`.

    A run that goes back to an earlier step writes the steps after it again. The first line that is written, or
    `resume`, then moves the lines of that step and later ones to `metrics.train.replaced.jsonl`: no step is counted
    twice, and nothing is lost.

    Raises:
        ConfigError: `wandb.project` is set, and wandb is not installed.
        DiskError: from every method but `close`, when the disk is full.
    """

    def __init__(self, run_dir: Path, args: TrainArgs, ctx: "Context"):
        self.run_dir, self.active = Path(run_dir), ctx.rank == 0
        self._trimmed: set[str] = set()
        self._board: Any = None
        self._wandb: Any = None
        if not self.active:
            return
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        if args.wandb.project is not None:
            self._wandb = _start_wandb(self.run_dir, args)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Metrics of training, after `step` optimizer steps."""
        self._write("train", step, values)

    def eval(self, step: int, values: dict[str, float]) -> None:
        """Metrics of an evaluation, after `step` optimizer steps."""
        self._write("eval", step, values)

    def resume(self, step: int) -> None:
        """Sets aside the lines of steps after `step`, of which the run has now gone back; call it after loading."""
        for kind in ("train", "eval") if self.active else ():
            with writing(self._file(kind)):
                self._trim(kind, step + 1)

    def report(self) -> Path:
        """Draws `report.png` in the run's folder from the two files, for the whole run. Returns its path."""
        path = self.run_dir / "report.png"
        if self.active:
            with writing(path):
                _draw(read_metrics(self._file("train")), read_metrics(self._file("eval")), path)
        return path

    def close(self) -> None:
        """Ends tensorboard and Weights & Biases; what was written is on the disk.

        A disk that is full is no error any more: it would hide the one that the run ends with.
        """
        try:
            if self._board:
                self._board.close()
        except OSError as error:
            logger.warning("The last of tensorboard's curves could not be written: %s", error)
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _file(self, kind: str) -> Path:
        return self.run_dir / f"metrics.{kind}.jsonl"

    def _write(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.active:
            return
        finite = {key: float(value) if math.isfinite(value) else None for key, value in values.items()}
        with writing(self._file(kind)):
            if kind not in self._trimmed:
                self._trim(kind, step)
            with self._file(kind).open("a") as file:
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
            if self._board is None:
                self._board = _start_tensorboard(self.run_dir, step)
            for key, value in values.items() if self._board else ():
                self._board.add_scalar(key if "/" in key else f"{kind}/{key}", value, step)
        if self._wandb is not None:
            self._wandb.log({key if "/" in key else f"{kind}/{key}": value for key, value in values.items()}, step=step)

    def _trim(self, kind: str, step: int) -> None:
        """Moves the lines of `step` and later, and a line cut off by a kill, to the file of what was replaced."""
        self._trimmed.add(kind)
        path = self._file(kind)
        if not path.is_file():
            return
        lines = path.read_text().splitlines()
        earlier = [
            line for line in lines if isinstance(at := (parse_object(line) or {}).get("step"), int) and at < step
        ]
        if len(earlier) == len(lines):
            return
        known = set(earlier)
        with path.with_suffix(".replaced.jsonl").open("a") as file:
            file.writelines(f"{line}\n" for line in lines if line not in known)
        write_whole(path, "".join(f"{line}\n" for line in earlier))
        logger.info("%s: %d lines of step %d and later set aside", path, len(lines) - len(earlier), step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics file in order, without a line cut off by a kill; empty when there is no file."""
    return [_renamed(entry) for entry in read_json_lines(path) if isinstance(entry.get("step"), int)]


def _renamed(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with today's names: runs before 2026-11-25 wrote `ttt_gain`, the reliance with the other sign."""
    gain, error = entry.pop("ttt_gain", None), entry.pop("ttt_gain_error", None)
    if isinstance(gain, (int, float)):
        entry["ttt_reliance"] = -gain
    return entry if error is None else entry | {"ttt_reliance_error": error}


def _start_tensorboard(run_dir: Path, step: int) -> Any:
    """A writer whose curves begin at `step`: what an earlier process wrote from there on is not shown. Or False."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("No curves for tensorboard: it is not installed; `pip install tensorboard`.")
        return False
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=step)


def _start_wandb(run_dir: Path, args: TrainArgs) -> Any:
    """A run that a resumed training continues: its identity is kept in the run's folder."""
    try:
        import wandb
    except ImportError as error:
        raise ConfigError(
            f"wandb.project={args.wandb.project!r}: wandb is not installed; `pip install wandb`, or set it to null."
        ) from error
    identity = run_dir / "wandb_id.txt"
    if not identity.is_file():
        with writing(identity):
            identity.write_text(uuid.uuid4().hex[:8])
    if args.wandb.key and not args.wandb.offline:
        wandb.login(key=args.wandb.key)
    return wandb.init(
        project=args.wandb.project,
        name=args.wandb.run_name,
        id=identity.read_text().strip(),
        resume="allow",
        mode="offline" if args.wandb.offline else "online",
        dir=str(run_dir),
        config=to_dict(args),
    )


def _draw(train: list[dict[str, Any]], evaluation: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 11), layout="constrained")
    FigureCanvasAgg(figure)
    loss, delta, rate = figure.subplots(3, 1)
    for axes, title, unit in (
        (loss, "Loss", "nats"),
        (delta, "Relative delta of the fast weights, per layer", "‖delta‖ / ‖W_down‖"),
        (rate, "Learning rates", "rate"),
    ):
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.grid(alpha=0.3)
    for key in filter(_is_loss, _keys(train)):
        _plot(loss, train, key, key if "/" in key else f"train/{key}", "-")
    for key in filter(_is_loss, _keys(evaluation)):
        _plot(loss, evaluation, key, key if "/" in key else f"eval/{key}", "o--")
    for entries, style in ((train, "-"), (evaluation, "o--")):
        for key in _keys(entries):
            if match := RELATIVE_DELTA.search(key):
                _plot(delta, entries, key, match[1], style)
    for key in filter(_is_rate, _keys(train)):
        _plot(rate, train, key, key, "-")
    values = [value for line in delta.get_lines() for value in line.get_ydata()]
    if values and min(values) > 0:
        delta.set_yscale("log")
    for axes in (loss, delta, rate):
        if axes.get_lines():
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "nothing was logged", ha="center", transform=axes.transAxes)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


def _plot(axes: Any, entries: list[dict[str, Any]], key: str, label: str, style: str) -> None:
    points = [(entry["step"], entry[key]) for entry in entries if isinstance(entry.get(key), (int, float))]
    if points:
        axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1, markersize=3)


def _keys(entries: list[dict[str, Any]]) -> list[str]:
    """All keys of the values, in the order of their first appearance."""
    return [key for key in dict.fromkeys(key for entry in entries for key in entry) if key not in ("step", "time")]


def _is_loss(key: str) -> bool:
    """`loss`, `eval/loss_updates_off`, `text_loss`."""
    name = key.split("/")[-1]
    return name == "loss" or name.startswith("loss_") or name.endswith("_loss")


def _is_rate(key: str) -> bool:
    """`lr`, `lr/targets`, `optim/lr`, `lr_targets`."""
    return any(part == "lr" or part.startswith("lr_") or part.endswith("_lr") for part in key.split("/"))
