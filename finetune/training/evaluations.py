"""The evaluations of a run: when they are due, what is logged of each, the best step, a sample to listen to."""

import logging
import math
from collections.abc import Callable
from pathlib import Path

from ..checkpoint.best import Best, read_best, write_best
from ..checkpoint.checkpointer import Checkpointer
from ..checkpoint.folders import list_checkpoints
from ..checkpoint.training_state import TrainState
from ..common.distributed import Context, on_rank_0
from ..data.loader import EvalLoader
from ..settings.modes import saves
from ..settings.schema import TrainArgs
from .advice import Advice
from .control import compare_now
from .held_out import Evaluation, evaluate
from .metrics import Monitor, read_metrics
from .samples import make_sample

logger = logging.getLogger(__name__)


class Evaluations:
    """Evaluates a run; all ranks call each method.

    Args:
        loader: None when the run has no held-out data; then nothing is done.
        stop: asked before each batch; anything true gives the evaluation up. The same on all ranks.
    """

    def __init__(
        self,
        loader: EvalLoader | None,
        args: TrainArgs,
        ctx: Context,
        monitor: Monitor,
        checkpointer: Checkpointer,
        stop: Callable[[], object],
    ):
        self._loader, self._args, self._ctx = loader, args, ctx
        self._monitor, self._checkpointer, self._stop = monitor, checkpointer, stop
        self._advice, self._number = Advice(args.ttt.kind), 0

    def resume(self, step: int) -> None:
        """After a run went to `step`: looks at the evaluations up to it, and which of them has the best checkpoint."""
        path = Path(self._args.run_dir) / "metrics.eval.jsonl"
        for entry in read_metrics(path) if self._ctx.rank == 0 else ():
            if entry["step"] <= step and isinstance(entry.get("loss"), float):
                self._advice.remember(entry["step"], entry["loss"], entry.get("loss_updates_off"))
        if self._loader is not None and self._args.keep_best and saves(self._args):
            on_rank_0(self._ctx, lambda: self._find_best(step))

    def is_owed(self, step: int) -> bool:
        """Whether an evaluation of `step` was begun, or due, and never finished. Collective."""
        path = Path(self._args.run_dir) / "metrics.eval.jsonl"
        done = on_rank_0(self._ctx, lambda: any(entry["step"] == step for entry in read_metrics(path)))
        return self.is_due(step) and not done

    def is_due(self, step: int) -> bool:
        """Whether there is to be an evaluation after `step`; at the last one always."""
        return self._loader is not None and step > 0 and is_due(self._args.eval_freq, step, self._args.max_steps)

    def run(self, state: TrainState) -> bool:
        """Evaluates, logs and keeps the best. Returns False when it was given up; then nothing was logged."""
        found = evaluate(state.model, self._loader, self._args, self._ctx, self._stop)
        if found is None:
            return False
        self._number += 1
        on_rank_0(self._ctx, lambda: self._log(state.step, found))
        self._keep_if_best(state, found.values["loss"])
        self._sample(state)
        return True

    def _log(self, step: int, found: Evaluation) -> None:
        values = found.values | compare_now(self._args, step, found.shares)
        self._monitor.eval(step, values, found.shares)
        words = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        logger.info("Step %d, evaluation: %s", step, words)
        self._advice.observe(step, values)

    def _keep_if_best(self, state: TrainState, loss: float) -> None:
        if not (self._args.keep_best and saves(self._args) and math.isfinite(loss)):
            return
        folder = self._checkpointer.folder
        best = on_rank_0(self._ctx, lambda: read_best(folder))
        if best is None or loss < best.loss:
            self._checkpointer.save(state)  # nothing to do when it was due
            on_rank_0(self._ctx, lambda: write_best(folder, Best(state.step, loss)))
            on_rank_0(self._ctx, self._checkpointer.prune)  # the best one before

    def _find_best(self, step: int) -> None:
        folder = self._checkpointer.folder
        there = list_checkpoints(folder)
        evaluated = {entry["step"]: entry.get("loss") for entry in read_metrics(folder.parent / "metrics.eval.jsonl")}
        known = [Best(at, loss) for at, loss in evaluated.items() if at in there and at <= step and loss is not None]
        best = min(known, key=lambda best: best.loss, default=None)
        if best != read_best(folder):
            write_best(folder, best)

    def _sample(self, state: TrainState) -> None:
        frequency = self._args.sample_freq
        if frequency == 0 or (self._number - 1) % frequency:
            return
        if self._ctx.world_size > 1:
            if self._number == 1 and self._ctx.rank == 0:
                logger.info("No samples are spoken: the model is spread over %d processes.", self._ctx.world_size)
            return
        sample = make_sample(state.model, self._loader)
        if sample is not None:
            self._monitor.sample(state.step, sample)


def is_due(frequency: int, step: int, last: int) -> bool:
    """Whether something done every `frequency` steps (0: at the end alone) is due after `step` of `last`."""
    return step == last or (frequency > 0 and step % frequency == 0)
