"""A training run from its settings to its last checkpoint."""

import contextlib
import logging
import math
import resource
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.utils.compile import no_compile
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.training_state import TrainState
from ..common.distributed import Context, cleanup, on_all_ranks, on_rank_0, setup, sum_over_ranks
from ..common.errors import UserError
from ..model.loss import LossParts
from ..model.trainable import parameter_groups
from ..settings.schema import STEPS_PER_SECOND, TrainArgs
from ..settings.validation import unusual_settings, validate
from .activity import Activity, InactivityWatch
from .advice import Advice
from .batch_loss import batch_counts, forward_loss
from .build_model import build_model
from .held_out import evaluate
from .metrics import Monitor
from .open_data import check_data, open_data
from .optimizer import build_optimizer, learning_rates
from .run_dir import check_run_dir, start_run_dir

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 10
"""So many steps in a row with a non-finite loss or gradient stop the run."""


class TrainingDiverged(UserError, RuntimeError):
    """Loss or gradients were not finite for `MAX_BAD_STEPS` steps in a row; the last checkpoint is from before."""


@dataclass
class StepResult:
    """What one step did, over all ranks.

    Args:
        loss: of the global batch; text and audio alone in `text` and `audio`.
        grad_norm: before clipping.
        rates: learning rate of each group in this step.
        applied: False when the update was skipped because loss or gradient were not finite.
    """

    loss: float
    text: float
    audio: float
    grad_norm: float
    rates: dict[str, float]
    applied: bool


def train(args: TrainArgs) -> None:
    """Runs `args`, in one process or, under `torchrun`, in many.

    Raises:
        ConfigError: for settings that cannot work or files that cannot be used, before the disk is changed.
        BrokenData: for data that cannot be used, before the model is loaded as far as it shows there.
        DiskError: when the disk is full; the last complete checkpoint is intact.
        TrainingDiverged: see there.
    """
    validate(args)
    ctx = setup()
    try:
        for message in unusual_settings(args) if ctx.rank == 0 else ():
            logger.warning("%s", message)
        on_rank_0(ctx, lambda: check_run_dir(args))
        check_data(args, ctx)
        _train(args, ctx)
    finally:
        cleanup()


def _train(args: TrainArgs, ctx: Context) -> None:
    """Holds the model, and frees it when it returns: only then can the process group end."""
    # On a CPU, compiling takes longer than what it saves.
    compiling = no_compile() if ctx.device.type == "cpu" else contextlib.nullcontext()
    with compiling, contextlib.closing(Trainer(args, ctx)) as trainer:
        trainer.run()


class Trainer:
    """Everything that a run holds; `run()` takes it to `args.max_steps`.

    Args:
        args: validated. Its `run_dir` is made, or what is there moved aside, when all that can refuse the run has not.

    Raises:
        ConfigError, BrokenData: on every rank; nothing on the disk was changed.
    """

    def __init__(self, args: TrainArgs, ctx: Context):
        self.args, self.ctx = args, ctx
        built = build_model(args, ctx)
        self.model = built.model
        loader, self.eval_loader = open_data(args, ctx, built)
        optimizer, scheduler = build_optimizer(parameter_groups(self.model, args), args)
        self.state = TrainState(0, self.model, optimizer, scheduler, loader)
        self.checkpointer = Checkpointer(Path(args.run_dir), args, built.lm_config, ctx)
        torch.manual_seed(args.seed + ctx.rank)
        np.random.seed(args.seed % 2**32)  # noqa: NPY002
        self._resume()
        run_dir = on_rank_0(ctx, lambda: start_run_dir(args))  # not before: a run that is refused changes nothing
        self.monitor = on_all_ranks(ctx, lambda: Monitor(run_dir, args, ctx))
        on_rank_0(ctx, lambda: self.monitor.resume(self.state.step))
        self.activity, self._watch, self._advice = Activity(self.model, ctx), InactivityWatch(), Advice()
        self._bad_steps, self._save_owed = 0, False
        self._clock = (time.monotonic(), self.state.step)

    def close(self) -> None:
        """Closes what was opened for logging."""
        self.monitor.close()

    def run(self) -> None:
        """Trains, logs, saves and evaluates until `max_steps`, the last step always included."""
        args, state = self.args, self.state
        if state.step >= args.max_steps:
            logger.warning("max_steps=%d is reached already, at step %d.", args.max_steps, state.step)
        self._clock = (time.monotonic(), state.step)
        progress = {"total": args.max_steps, "initial": state.step, "unit": "step", "disable": self.ctx.rank != 0}
        with logging_redirect_tqdm(), tqdm(**progress) as bar:
            while state.step < args.max_steps:
                logged = self._due(args.log_freq, state.step + 1)
                result = self.train_step(measure=logged)
                bar.update()
                bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
                if logged:
                    self._log(result)
                if args.do_ckpt:  # first: data that breaks the evaluation must not cost the steps before it
                    self._save()
                if self.eval_loader is not None and self._due(args.eval_freq):
                    self._evaluate()
        on_rank_0(self.ctx, self.monitor.report)

    def train_step(self, measure: bool = False) -> StepResult:
        """One update from `num_microbatches` batches per rank; advances `state.step`.

        The loss is that of the global batch: sums over all positions of all ranks and microbatches, over the sums of
        their counts. `measure` prepares `activity.values()`.

        Raises:
            TrainingDiverged: after `MAX_BAD_STEPS` steps whose loss or gradients were not finite.
        """
        args, ctx, state = self.args, self.ctx, self.state
        batches = [next(state.loader) for _ in range(args.num_microbatches)]
        counts = sum_over_ranks(sum(batch_counts(self.model, batch, args, ctx) for batch in batches))
        sums = torch.zeros_like(counts)
        for index, batch in enumerate(batches):
            with self.activity.measure() if measure and index == 0 else contextlib.nullcontext():
                parts = forward_loss(self.model, batch, args, ctx)
            # FSDP takes the mean over ranks, where the sum is wanted.
            (parts.normalised_by(counts) * ctx.world_size).backward()
            sums += parts.sums.detach()
        total = LossParts(sum_over_ranks(sums), counts)
        norm = self._clip()
        loss, text, audio, grad_norm = torch.stack([total.loss, total.text, total.audio, norm.to(counts)]).tolist()
        applied = math.isfinite(loss) and math.isfinite(grad_norm)
        rates = dict(learning_rates(state.optimizer))
        if applied:
            state.optimizer.step()
        state.optimizer.zero_grad()
        with _quiet_scheduler():
            state.scheduler.step()
        state.step += 1
        self._count_bad_steps(loss, grad_norm, applied)
        return StepResult(loss, text, audio, grad_norm, rates, applied)

    def _clip(self) -> torch.Tensor:
        """Clips the gradients of all ranks together; their norm before that."""
        if isinstance(self.model, FullyShardedDataParallel):
            return self.model.clip_grad_norm_(self.args.max_norm)
        return nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_norm)

    def _count_bad_steps(self, loss: float, grad_norm: float, applied: bool) -> None:
        self._bad_steps = 0 if applied else self._bad_steps + 1
        if applied:
            return
        logger.warning(
            "Step %d: loss %g, gradient norm %g; the update is skipped (%d in a row).",
            self.state.step,
            loss,
            grad_norm,
            self._bad_steps,
        )
        if self._bad_steps >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"Loss or gradients were not finite in {MAX_BAD_STEPS} steps in a row, up to step {self.state.step}. "
                "The parameters are those of the last good step; lower optim.lr or max_norm and continue with --resume."
            )

    def _due(self, frequency: int, step: int | None = None) -> bool:
        """Whether something done every `frequency` steps (0: at the end alone) is due after `step`."""
        step = self.state.step if step is None else step
        return step == self.args.max_steps or (frequency > 0 and step % frequency == 0)

    def _log(self, result: StepResult) -> None:
        state, args, now = self.state, self.args, time.monotonic()
        (before, first), self._clock = self._clock, (now, state.step)
        rate = (state.step - first) / max(now - before, 1e-9)
        items = args.batch_size * args.num_microbatches * self.ctx.world_size
        steps = state.loader.tokenizer.steps
        activity = self.activity.values()
        values = {
            "loss": result.loss,
            "text_loss": result.text,
            "audio_loss": result.audio,
            "grad_norm": result.grad_norm,
            "skipped": float(not result.applied),
            **{f"lr/{name}": lr for name, lr in result.rates.items()},
            "steps_per_second": rate,
            "tokens_per_second": rate * items * steps * (1 + self.model.n_q),
            "audio_seconds_per_second": rate * items * steps / STEPS_PER_SECOND,
            "peak_memory_gib": peak_memory(self.ctx.device) / 2**30,
            **activity,
        }
        on_rank_0(self.ctx, lambda: self.monitor.train(state.step, values))  # a full disk ends all ranks
        if self.ctx.rank == 0:
            self._watch.observe(state.step, activity)

    def _evaluate(self) -> None:
        values = evaluate(self.model, self.eval_loader, self.args, self.ctx).values
        on_rank_0(self.ctx, lambda: self.monitor.eval(self.state.step, values))
        if self.ctx.rank == 0:
            logger.info("Step %d, evaluation: %s", self.state.step, _in_words(values))
            self._advice.observe(self.state.step, values)

    def _save(self) -> None:
        """When due; in a row of bad steps only after it, so that it cannot displace checkpoints from before."""
        self._save_owed |= self._due(self.args.ckpt_freq)
        if self._save_owed and (self._bad_steps == 0 or self.state.step == self.args.max_steps):
            self.checkpointer.save(self.state)
            self._save_owed = False

    def _resume(self) -> None:
        """From the checkpoint that was asked for, if there is one."""
        if not self.args.checkpoint.resume:
            return
        found = self.checkpointer.find(self.args.checkpoint.resume_step)
        if found is not None:
            self.checkpointer.load(found, self.state)
        elif self.ctx.rank == 0:
            logger.warning("Nothing to resume in %s; training starts at step 0.", self.args.run_dir)


def peak_memory(device: torch.device) -> int:
    """Bytes: what tensors took at most on a GPU, what the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextlib.contextmanager
def _quiet_scheduler():
    """A skipped first update makes torch warn that the scheduler came before the optimizer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield


def _in_words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
