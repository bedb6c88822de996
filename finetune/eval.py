"""Evaluation: the training loss over all of the evaluation data, with TTT's updates and, as its control, without."""

import torch
from torch import nn

import moshi_patch

from .args import TrainArgs
from .data.items import BrokenData
from .data.loader import Batch, EvalLoader
from .distributed import Context, sum_over_ranks
from .loss import LossParts, compute_loss, perplexity


def forward_loss(model: nn.Module, batch: Batch, args: TrainArgs, ctx: Context) -> LossParts:
    """One forward pass over this rank's `batch`: the weighted sums of its loss."""
    codes, conditions = batch.codes.to(ctx.device), None
    if batch.condition_attributes is not None:
        conditions = model.condition_provider.prepare_and_provide(batch.condition_attributes)
    return batch_loss(model, model(codes=codes, condition_tensors=conditions), codes, args)


def batch_loss(model: nn.Module, output, codes: torch.Tensor, args: TrainArgs) -> LossParts:
    """`compute_loss` with the settings of `args` and the special tokens of `model`."""
    return compute_loss(
        output,
        codes,
        dep_q=model.dep_q,
        text_padding_weight=args.text_padding_weight,
        first_codebook_weight_multiplier=args.first_codebook_weight_multiplier,
        text_padding_ids=(model.text_padding_token_id, model.end_of_text_padding_id),
    )


def evaluate(model: nn.Module, loader: EvalLoader, args: TrainArgs, ctx: Context) -> dict[str, float]:
    """Means over all evaluation data of all ranks, in nats; all ranks call it and all get the same.

    Returns:
        `loss`, `text_loss`, `audio_loss`, `perplexity`, `text_perplexity`; with TTT also `loss_updates_off` and
        `text_loss_updates_off`, of the same weights with nothing learnt from the stream.

    Raises:
        BrokenData: when not one item could be read.
    """
    training = model.training
    model.eval()
    try:
        parts = _total(model, loader, args, ctx)
        values = {
            "loss": parts.loss,
            "text_loss": parts.text,
            "audio_loss": parts.audio,
            "perplexity": perplexity(parts.loss),
            "text_perplexity": perplexity(parts.text),
        }
        if moshi_patch.ttt_gatings(model):
            with moshi_patch.ttt_updates(model, enabled=False):
                control = _total(model, loader, args, ctx)
            values |= {"loss_updates_off": control.loss, "text_loss_updates_off": control.text}
    finally:
        model.train(training)
    return {name: value.item() for name, value in values.items()}


@torch.no_grad()
def _total(model: nn.Module, loader: EvalLoader, args: TrainArgs, ctx: Context) -> LossParts:
    zero = torch.zeros(1 + model.dep_q, device=ctx.device)
    parts = sum((forward_loss(model, batch, args, ctx) for batch in loader), start=LossParts(zero, zero))
    total = LossParts(sum_over_ranks(parts.sums), sum_over_ranks(parts.weights))
    if not total.weights.any():  # the same on all ranks
        raise BrokenData(
            f"data.eval_data={args.data.eval_data!r}: no item could be read, so there is no loss to report."
        )
    return total
