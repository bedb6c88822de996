"""What a run logs: lines of JSON, curves and samples for tensorboard, Weights & Biases if wanted."""

import json
import logging
import math
import time
import uuid
from pathlib import Path
from typing import Any

from ..common.disk import writing
from ..common.distributed import Context
from ..common.errors import ConfigError
from ..common.files import finite_or_none, parse_object, read_json_lines, write_whole
from ..settings.record import to_dict
from ..settings.schema import TrainArgs
from .samples import Sample, write_sample

logger = logging.getLogger(__name__)

KINDS_OF_LINES = ("train", "eval", "recordings")


class Monitor:
    """Writes the metrics of a run on rank 0; on other ranks every method does nothing.

    `metrics.train.jsonl` and `metrics.eval.jsonl` in `run_dir` hold one object per line: `step`, `time` (seconds since
    1970) and the values; a value that is not finite is null. `metrics.recordings.jsonl` holds what each held-out
    recording added to the loss of an evaluation, its `shares`. tensorboard's curves are in `run_dir/tensorboard`.

    A run that goes back to an earlier step writes the steps after it again. The first line that is written, or
    `resume`, then moves the lines of that step and later ones to `metrics.train.replaced.jsonl`: no step is counted
    twice, and nothing is lost.

    Raises:
        ConfigError: `wandb.project` is set, and wandb is not installed.
        DiskError: from every method but `close`, when the disk is full.
    """

    def __init__(self, run_dir: Path, args: TrainArgs, ctx: Context):
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

    def eval(self, step: int, values: dict[str, float], shares: dict[str, float] | None = None) -> None:
        """Metrics of an evaluation, after `step` optimizer steps, and the shares of the recordings in its loss."""
        if shares is not None:  # first: when there is a line of the evaluation, then there is one of its recordings
            self._append("recordings", step, {"shares": finite_or_none(shares)})
        self._write("eval", step, values)

    def sample(self, step: int, sample: Sample) -> None:
        """A spoken and written sample, after `step` optimizer steps: WAV and text, and both in tensorboard."""
        if not self.active:
            return
        path = write_sample(self.run_dir, step, sample)
        if board := self._open_board(step):
            with writing(path):
                board.add_audio("sample/speech", sample.pcm.sum(0).clip(-1, 1), step, sample_rate=sample.rate)
                board.add_text("sample/words", sample.in_words().replace("\n", "  \n"), step)

    def resume(self, step: int) -> None:
        """Sets aside the lines of steps after `step`, of which the run has now gone back; call it after loading."""
        for kind in KINDS_OF_LINES if self.active else ():
            with writing(self._file(kind)):
                self._trim(kind, step + 1)

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
        self._append(kind, step, {key: float(value) if math.isfinite(value) else None for key, value in values.items()})
        named = {key if "/" in key else f"{kind}/{key}": value for key, value in values.items()}
        if board := self._open_board(step):
            with writing(self.run_dir / "tensorboard"):
                for key, value in named.items():
                    board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(named, step=step)

    def _append(self, kind: str, step: int, content: dict[str, Any]) -> None:
        if not self.active:
            return
        with writing(self._file(kind)):
            if kind not in self._trimmed:
                self._trim(kind, step)
            with self._file(kind).open("a") as file:
                file.write(json.dumps({"step": step, "time": round(time.time(), 3), **content}) + "\n")

    def _open_board(self, step: int) -> Any:
        if self._board is None:
            with writing(self.run_dir / "tensorboard"):
                self._board = _start_tensorboard(self.run_dir, step)
        return self._board

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
