"""A training run from its settings to its last checkpoint."""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import moshi_patch

from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.training_state import TrainState
from ..common.distributed import Context, cleanup, on_all_ranks, on_rank_0, setup
from ..common.errors import UserError
from ..model.trainable import parameter_groups
from ..settings.modes import trains_ttt
from ..settings.schema import TrainArgs
from ..settings.validation import unusual_settings, validate
from .activity import Activity, InactivityWatch
from .build_model import build_model
from .control import check_control, control_args, is_finished
from .evaluations import Evaluations, is_due
from .explosion import ExplosionWatch, relative_deltas, suspects
from .metrics import Monitor
from .open_data import check_data, open_data
from .optimizer import build_optimizer
from .plots import draw_report
from .progress import Progress, progress_line
from .run_dir import RunDir
from .signals import Stopped, StopSignals, signal_name
from .summary import resume_command, summary
from .update import StepResult, update

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 10
"""So many steps in a row with a non-finite loss or gradient stop the run."""


class TrainingDiverged(UserError, RuntimeError):
    """Loss or gradients were not finite for `MAX_BAD_STEPS` steps in a row; the last checkpoint is from before."""


def train(args: TrainArgs) -> str:
    """Runs `args`, and its control if it is to have one, in one process or, under `torchrun`, in many.

    Returns:
        On rank 0 what the run came to, in words; "" on the others.

    Raises:
        ConfigError: for settings that cannot work or files that cannot be used, before the disk is changed.
        BrokenData: for data that cannot be used, before the model is loaded as far as it shows there.
        DiskError: when the disk is full; the last complete checkpoint is intact.
        TrainingDiverged: see there.
        Stopped: after SIGTERM or SIGINT, when what was done is saved.
    """
    validate(args)
    ctx, started = setup(), time.monotonic()
    try:
        with StopSignals() as stop:
            for message in unusual_settings(args) if ctx.rank == 0 else ():
                logger.warning("%s", message)
            if args.control:
                on_rank_0(ctx, lambda: check_control(control_args(args)))
            _train(args, ctx, stop)
            if args.control:
                _train_control(args, ctx, stop)
        return summary(args, time.monotonic() - started, ctx.world_size) if ctx.rank == 0 else ""
    finally:
        cleanup()


def _train_control(args: TrainArgs, ctx: Context, stop: StopSignals) -> None:
    """Trains the control of `args`, unless that is done."""
    control = on_rank_0(ctx, lambda: control_args(args))  # looks at the disk
    if on_rank_0(ctx, lambda: is_finished(control)):
        return
    if signal := stop.agreed():
        _raise_stopped(signal, "before the control", args, ctx)
    logger.info("The control: the same run without TTT, in %s.", control.run_dir)
    _train(control, ctx, stop)
    on_rank_0(ctx, lambda: draw_report(Path(args.run_dir)))


def _raise_stopped(signal: int, where: str, args: TrainArgs, ctx: Context) -> NoReturn:
    """Ends the run: rank 0 with a line of how to go on, the others without a word."""
    if ctx.rank != 0:
        raise SystemExit(128 + signal)
    command = resume_command(args, ctx.world_size)
    raise Stopped(f"stopped by {signal_name(signal)} {where}. Continue with: {command}", signal)


def _train(args: TrainArgs, ctx: Context, stop: StopSignals) -> None:
    """Holds the folder and the model, and frees both when it returns: only then can the process group end."""
    with moshi_patch.without_compiling(ctx.device), contextlib.closing(RunDir(args)) as run_dir:
        stop.finishing = False  # there is nothing to save while it starts
        on_rank_0(ctx, run_dir.check)
        check_data(args, ctx)
        with contextlib.closing(Trainer(args, ctx, run_dir, stop)) as trainer:
            trainer.run()


class Trainer:
    """Everything that a run holds; `run()` takes it to `args.max_steps`.

    Args:
        args: validated.
        run_dir: checked; it is made, or what is there moved aside, when all that can refuse the run has not.

    Raises:
        ConfigError, BrokenData: on every rank; nothing on the disk was changed.
    """

    def __init__(self, args: TrainArgs, ctx: Context, run_dir: RunDir, stop: StopSignals):
        self.args, self.ctx, self._stop = args, ctx, stop
        built = build_model(args, ctx)
        self.model = built.model
        loader, self.eval_loader = open_data(args, ctx, built)
        groups = parameter_groups(self.model, args)
        optimizer, scheduler = build_optimizer(groups, args.optim, args.max_steps) if groups else (None, None)
        self.state = TrainState(0, self.model, optimizer, scheduler, loader)
        self.checkpointer = Checkpointer(run_dir.path, args, built.lm_config, ctx)
        torch.manual_seed(args.seed + ctx.rank)
        np.random.seed(args.seed % 2**32)  # noqa: NPY002
        self._resume()
        on_rank_0(ctx, run_dir.start)  # not before: a run that is refused changes nothing
        self.monitor = on_all_ranks(ctx, lambda: Monitor(run_dir.path, args, ctx))
        on_rank_0(ctx, lambda: self.monitor.resume(self.state.step))
        self.evaluations = Evaluations(self.eval_loader, args, ctx, self.monitor, self.checkpointer, stop.agreed)
        self.evaluations.resume(self.state.step)
        self.activity, self._watch = Activity(self.model, ctx), InactivityWatch()
        self._explosion = ExplosionWatch(args)
        self._grad_norm: tuple[int, float] | None = None
        self._deltas: dict[str, float] = {}
        self._bad_steps, self._save_owed = 0, False
        self._progress = Progress(args, ctx)

    def close(self) -> None:
        """Closes what was opened for logging."""
        self.monitor.close()

    def run(self) -> None:
        """Trains, logs, saves and evaluates until `max_steps`, the last step always included.

        Raises:
            Stopped: after a signal; the step was finished and saved.
        """
        args, state = self.args, self.state
        self._stop.finishing = True
        if state.step >= args.max_steps:
            logger.warning("max_steps=%d is reached already, at step %d.", args.max_steps, state.step)
        self._progress.start(state.step)
        progress = {"total": args.max_steps, "initial": state.step, "unit": "step"}
        hidden = True if self.ctx.rank != 0 else None  # None: hidden where there is no terminal
        with logging_redirect_tqdm(), tqdm(**progress, disable=hidden) as bar:
            if self.evaluations.is_owed(state.step):
                self._evaluate()
            while state.step < args.max_steps:
                logged = is_due(args.log_freq, state.step + 1, args.max_steps)
                result = self.train_step(measure=logged)
                bar.update()
                bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
                if logged:
                    self._log(result, in_lines=bar.disable)
                # Data that breaks the evaluation must not cost the steps before it.
                self._save()
                if signal := self._stop.decided(result.votes):
                    self._end(signal)
                if self.evaluations.is_due(state.step):
                    self._evaluate()
        on_rank_0(self.ctx, lambda: draw_report(Path(args.run_dir)))

    def train_step(self, measure: bool = False) -> StepResult:
        """One `update`. `measure` prepares `activity.values()`.

        Raises:
            TrainingDiverged: after `MAX_BAD_STEPS` steps whose loss or gradients were not finite.
        """
        measuring = self.activity.measure if measure or self._bad_steps else contextlib.nullcontext
        result = update(self.state, self.args, self.ctx, measure=measuring, votes=self._stop.votes)
        self._bad_steps = 0 if result.applied else self._bad_steps + 1
        if math.isfinite(result.grad_norm):
            self._grad_norm = (self.state.step, result.grad_norm)
        if self._bad_steps > 1:
            self._deltas = relative_deltas(self.activity.values())
        if not result.applied:
            logger.warning(
                "Step %d: loss %g, gradient norm %g; the update is skipped (%d in a row).",
                self.state.step,
                result.loss,
                result.grad_norm,
                self._bad_steps,
            )
        if self._bad_steps >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"Loss or gradients were not finite in {MAX_BAD_STEPS} steps in a row, up to step {self.state.step}. "
                f"The parameters are those of the last good step. {suspects(self.args, self._grad_norm, self._deltas)} "
                "Lower one of them and continue with --resume."
            )
        return result

    def _log(self, result: StepResult, in_lines: bool) -> None:
        activity = self.activity.values()
        self._deltas = relative_deltas(activity)
        values = self._progress.values(self.state, result) | activity
        on_rank_0(self.ctx, lambda: self.monitor.train(self.state.step, values))  # a full disk ends all ranks
        if self.ctx.rank == 0:
            if trains_ttt(self.args):
                self._watch.observe(self.state.step, activity)
            self._explosion.observe(self.state.step, activity)
            if in_lines:
                logger.info("%s", progress_line(self.state.step, self.args.max_steps, values))

    def _evaluate(self) -> None:
        if not self.evaluations.run(self.state):
            self._end(self._stop.agreed())

    def _save(self) -> None:
        """When due; in a row of bad steps only after it, so that it cannot displace checkpoints from before."""
        last = self.state.step == self.args.max_steps
        self._save_owed |= is_due(self.args.ckpt_freq, self.state.step, self.args.max_steps)
        if self._save_owed and (self._bad_steps == 0 or last):
            self.checkpointer.save(self.state)
            self._save_owed = False

    def _end(self, signal: int) -> None:
        """Saves, and ends the run in one line."""
        saved = self.checkpointer.save(self.state)
        what = f"saved as {saved}" if saved is not None else "not saved, as do_ckpt is false or nothing trains"
        _raise_stopped(signal, f"at step {self.state.step}, {what}", self.args, self.ctx)

    def _resume(self) -> None:
        """From the checkpoint that was asked for, if there is one."""
        if not self.args.checkpoint.resume:
            return
        found = self.checkpointer.find(self.args.checkpoint.resume_step)
        if found is not None:
            self.checkpointer.load(found, self.state)
        elif self.ctx.rank == 0:
            logger.warning("Nothing to resume in %s; training starts at step 0.", self.args.run_dir)
