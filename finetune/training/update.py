"""One optimizer step: forward and backward over all microbatches of all ranks, clipping, update."""

import contextlib
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..checkpoint.training_state import TrainState
from ..common.distributed import Context, sum_over_ranks
from ..model.loss import LossParts
from ..settings.schema import TrainArgs
from .batch_loss import batch_counts, forward_loss
from .optimizer import learning_rates, waiting_parameters


@dataclass
class StepResult:
    """What one step did, over all ranks.

    Args:
        loss: of the global batch; text and audio alone in `text` and `audio`.
        grad_norm: before clipping.
        rates: learning rate of each group that trained in this step.
        applied: False when the update was skipped because loss or gradient were not finite.
        votes: the sums over ranks of what each had to say to the others.
    """

    loss: float
    text: float
    audio: float
    grad_norm: float
    rates: dict[str, float]
    applied: bool
    votes: list[float]


def update(
    state: TrainState,
    args: TrainArgs,
    ctx: Context,
    *,
    measure: Callable[[], AbstractContextManager] = contextlib.nullcontext,
    votes: Callable[[], list[float]] = list,
) -> StepResult:
    """One update from `num_microbatches` batches per rank; advances `state.step`. Collective.

    The loss is that of the global batch: sums over all positions of all ranks and microbatches, over the sums of
    their counts. Where nothing trains (no optimizer) it is computed, and that is all.

    Args:
        measure: entered around the first forward pass.
        votes: what this rank has to say to the others; asked after the backward passes, and summed with the loss, so
            that it costs no communication of its own.
    """
    trains = state.optimizer is not None
    batches = [next(state.loader) for _ in range(args.num_microbatches)]
    counts = sum_over_ranks(sum(batch_counts(state.model, batch, args, ctx) for batch in batches))
    sums = torch.zeros_like(counts)
    for index, batch in enumerate(batches):
        with measure() if index == 0 else contextlib.nullcontext(), torch.set_grad_enabled(trains):
            parts = forward_loss(state.model, batch, args, ctx)
        if trains:  # FSDP takes the mean over ranks, where the sum is wanted.
            (parts.normalised_by(counts) * ctx.world_size).backward()
        sums += parts.sums.detach()
    total = sum_over_ranks(torch.cat([sums, sums.new_tensor(votes())]))
    loss = LossParts(total[: len(sums)], counts)
    if not trains:
        state.step += 1
        value, text, audio, *voted = torch.stack([loss.loss, loss.text, loss.audio, *total[len(sums) :]]).tolist()
        return StepResult(value, text, audio, 0.0, {}, math.isfinite(value), voted)
    for parameter in waiting_parameters(state.optimizer, args.ttt, state.step):
        parameter.grad = None
    norm = _clip(state.model, args.max_norm)
    numbers = [loss.loss, loss.text, loss.audio, norm.to(counts), *total[len(sums) :]]
    value, text, audio, grad_norm, *voted = torch.stack(numbers).tolist()
    applied = math.isfinite(value) and math.isfinite(grad_norm)
    rates = dict(learning_rates(state.optimizer, args.ttt, state.step))
    if applied:
        state.optimizer.step()
    state.optimizer.zero_grad()
    with _quiet_scheduler():
        state.scheduler.step()
    state.step += 1
    return StepResult(value, text, audio, grad_norm, rates, applied, voted)


def _clip(model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clips the gradients of all ranks together; their norm before that."""
    if isinstance(model, FullyShardedDataParallel):
        return model.clip_grad_norm_(max_norm)
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


@contextlib.contextmanager
def _quiet_scheduler():
    """A skipped first update makes torch warn that the scheduler came before the optimizer."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        yield
