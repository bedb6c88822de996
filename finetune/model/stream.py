"""The loss of every step of a sequence of any length, in one pass with a sliding window and in bounded memory.

Shapes: `B` items, `T` steps, `K` = 1 + n_q rows of codes; `Q` = 1 + dep_q rows that are predicted, the text first.

The sequence is streamed in segments whose attention has its full window, so the outcome is that of a single pass.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from moshi.conditioners import ConditionTensors
from moshi.models.lm import LMModel, LMOutput

from ..common.sliding_window import FullWindow
from ..settings.evaluation import SEGMENT_STEPS
from .conditions import fused_conditions
from .loss import LossParts, position_losses

OUTPUT_STEPS = 256
"""Steps whose logits exist at a time."""


@dataclass(frozen=True)
class StepLosses:
    """Loss of every position of `codes`, as `finetune.model.loss` defines it.

    Args:
        nats: `[B, Q, T]` cross entropy on the CPU, at least float32; 0 where there is no weight.
        weights: `[B, Q, T]` float32 on the CPU; 0 where a position carries no loss.
    """

    nats: torch.Tensor
    weights: torch.Tensor

    def parts(self, first: int = 0, end: int | None = None) -> LossParts:
        """The sums over all items and the steps from `first` up to, not including, `end`; in float64."""
        nats, weights = (rows[..., first:end].double() for rows in (self.nats, self.weights))
        return LossParts((nats * weights).sum((0, 2)), weights.sum((0, 2)))


@torch.no_grad()
def score_stream(
    model: LMModel,
    codes: torch.Tensor,
    *,
    condition_tensors: ConditionTensors | None = None,
    segment_steps: int = SEGMENT_STEPS,
    text_padding_weight: float = 0.5,
    first_codebook_weight_multiplier: float = 1.0,
    progress: Callable[[int], object] | None = None,
) -> StepLosses:
    """The losses of `model(codes)` at every step, from one pass over `codes` in segments.

    TTT learns along the way, unless inside `moshi_patch.ttt_updates(model)`. Memory depends on `segment_steps` and the
    model's context, and on T by a few numbers per step alone.

    Args:
        model: in eval mode, not streaming; on any device.
        codes: `[B, K, T]` int64; shorter items are filled up with the model's zero token, which carries no loss.
        condition_tensors: as for `LMModel.forward`, of the same B items.
        text_padding_weight, first_codebook_weight_multiplier: as in `finetune.model.loss.compute_loss`.
        progress: called with the number of steps done since the last call.

    Raises:
        ValueError: for a model whose attention has no window (`context` null), or codes of another shape.
    """
    rows, steps, batch = 1 + model.dep_q, codes.shape[2], len(codes)
    nats = weights = None
    for first, output, targets in stream_outputs(
        model, codes, condition_tensors=condition_tensors, segment_steps=segment_steps
    ):
        losses = position_losses(
            output,
            targets,
            dep_q=model.dep_q,
            text_padding_weight=text_padding_weight,
            first_codebook_weight_multiplier=first_codebook_weight_multiplier,
            text_padding_ids=(model.text_padding_token_id, model.end_of_text_padding_id),
        )
        block = [torch.stack(parts, 1).cpu() for parts in zip(*losses, strict=True)]  # the only wait for the device
        if nats is None:
            nats, weights = (part.new_zeros(batch, rows, steps) for part in block)
        for row in range(rows):
            # A row that is delayed is predicted so many steps later; what lies before its beginning is no code.
            size, delay = targets.shape[2], model.delays[row]
            skipped = min(max(delay - first, 0), size)
            there = slice(first + skipped - delay, first + size - delay)
            for whole, part in ((nats, block[0]), (weights, block[1])):
                whole[:, row, there] = part[:, row, skipped:]
        if progress is not None:
            progress(targets.shape[2])
    return StepLosses(nats.masked_fill_(weights == 0, 0.0), weights)


@torch.no_grad()
def stream_outputs(
    model: LMModel,
    codes: torch.Tensor,
    *,
    condition_tensors: ConditionTensors | None = None,
    segment_steps: int = SEGMENT_STEPS,
) -> Iterator[tuple[int, LMOutput, torch.Tensor]]:
    """The logits of a stream, `OUTPUT_STEPS` steps at a time, in the order in which they are predicted.

    Yields:
        The first step S of a block; its `LMOutput`, whose rows `dep_q` and text stand at the steps at which they are
        predicted, delayed rows later, with a mask that is False for what is no code; and what is predicted there,
        `[B, Q, steps]`.
    """
    _check(model, codes, segment_steps)
    steps = codes.shape[2]
    fused = fused_conditions(model, condition_tensors)
    single = steps <= segment_steps  # a single pass then; no state is kept for what follows
    with nullcontext() if single else model.streaming(len(codes)):
        window = None if single else FullWindow(model)
        for first in range(0, steps, segment_steps):
            end = min(first + segment_steps, steps)
            # Step s hears what was predicted at s - 1; before the first step there are the initial tokens.
            delayed = _delayed(model, codes, first - 1, end)
            if window is not None:
                window.make_room(end)
            hidden, text_logits = model.forward_text(delayed[:, :, :-1], *fused)
            for start in range(0, end - first, OUTPUT_STEPS):
                block = slice(start, min(start + OUTPUT_STEPS, end - first))
                targets = delayed[:, :, 1:][:, :, block]
                output = _output(model, targets, hidden[:, block], text_logits[:, :, block], first + start)
                yield first + start, output, targets[:, : 1 + model.dep_q]


def _check(model: LMModel, codes: torch.Tensor, segment_steps: int) -> None:
    if model.context is None:
        raise ValueError("context=None: attention without a window needs memory for the whole of a stream.")
    if codes.dim() != 3 or codes.shape[1] != model.num_codebooks or not codes.numel():
        raise ValueError(f"codes of shape {list(codes.shape)}: must be [B, {model.num_codebooks}, T], not empty.")
    if segment_steps < 1:
        raise ValueError(f"segment_steps={segment_steps}: must be at least 1.")


def _delayed(model: LMModel, codes: torch.Tensor, first: int, end: int) -> torch.Tensor:
    """`[B, K, end - first]` on the model's device: at step s each row's code of `s - delay`, or its initial token."""
    initial = model._get_initial_token()[0, :, 0].tolist()
    rows = codes.new_empty(len(codes), codes.shape[1], end - first)
    for row, (delay, token) in enumerate(zip(model.delays, initial, strict=True)):
        known = codes[:, row, max(first - delay, 0) : max(end - delay, 0)]
        rows[:, row] = token
        rows[:, row, end - first - known.shape[1] :] = known
    return rows.to(model.device)


def _output(
    model: LMModel, targets: torch.Tensor, hidden: torch.Tensor, text_logits: torch.Tensor, first: int
) -> LMOutput:
    """The logits of a block that predicts `targets [B, K, S]`, and masks of what is a code."""
    delays = torch.tensor(model.delays[: 1 + model.dep_q], device=targets.device)
    steps = first + torch.arange(targets.shape[2], device=targets.device)
    mask = (targets[:, : 1 + model.dep_q] != model.zero_token_id) & (steps >= delays[:, None])
    logits = model.forward_depformer_training(targets, hidden) if model.dep_q else text_logits[:, :0]
    return LMOutput(logits, mask[:, 1:], text_logits, mask[:, :1])
