"""Evaluation: the training loss over all of the evaluation data, with TTT's updates and, as its control, without."""

import torch
from moshi.models.lm import LMOutput
from torch import nn

import moshi_patch

from ..common.distributed import Context, sum_over_ranks
from ..data.broken import BrokenData
from ..data.loader import Batch, EvalLoader
from ..model.loss import LossParts, compute_loss, perplexity
from ..settings.schema import TrainArgs


def forward_loss(model: nn.Module, batch: Batch, args: TrainArgs, ctx: Context) -> LossParts:
    """One forward pass over this rank's `batch`: the weighted sums of its loss."""
    output, codes = _forward(model, batch, ctx)
    return batch_loss(model, output, codes, args)


def _forward(model: nn.Module, batch: Batch, ctx: Context) -> tuple[LMOutput, torch.Tensor]:
    codes, conditions = batch.codes.to(ctx.device), None
    if batch.condition_attributes is not None:
        conditions = model.condition_provider.prepare_and_provide(batch.condition_attributes)
    return model(codes=codes, condition_tensors=conditions), codes


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
        `text_loss_updates_off`, of the same weights with nothing learnt from the stream, `ttt_gain`, the difference
        of the two losses, and `ttt_gain_error`, its standard error over the items, from two items on.

    Raises:
        BrokenData: when not one item could be read.
    """
    training = model.training
    model.eval()
    try:
        items = _items(model, loader, args, ctx)
        parts = _total(items, args, ctx)
        values = {
            "loss": parts.loss,
            "text_loss": parts.text,
            "audio_loss": parts.audio,
            "perplexity": perplexity(parts.loss),
            "text_perplexity": perplexity(parts.text),
        }
        if moshi_patch.ttt_gatings(model):
            with moshi_patch.ttt_updates(model, enabled=False):
                items_off = _items(model, loader, args, ctx)
            control = _total(items_off, args, ctx)
            values |= {"loss_updates_off": control.loss, "text_loss_updates_off": control.text}
            values |= _gain(items, items_off, parts.weights)
    finally:
        model.train(training)
    return {name: value.item() for name, value in values.items()}


@torch.no_grad()
def _items(model: nn.Module, loader: EvalLoader, args: TrainArgs, ctx: Context) -> LossParts:
    """Of each of this rank's items by itself: sums and weights are `[items, Q]`."""
    found = []
    for batch in loader:
        output, codes = _forward(model, batch, ctx)
        for row in (slice(index, index + 1) for index in range(len(codes))):
            parts = (output.logits, output.mask, output.text_logits, output.text_mask)
            found.append(batch_loss(model, LMOutput(*(part[row] for part in parts)), codes[row], args))
    blank = torch.zeros(0, 1 + model.dep_q, device=ctx.device)
    sums, weights = ([getattr(item, name)[None] for item in found] for name in ("sums", "weights"))
    return LossParts(torch.cat([blank, *sums]), torch.cat([blank, *weights]))


def _total(items: LossParts, args: TrainArgs, ctx: Context) -> LossParts:
    total = LossParts(sum_over_ranks(items.sums.sum(0)), sum_over_ranks(items.weights.sum(0)))
    if not total.weights.any():  # the same on all ranks
        raise BrokenData(
            f"data.eval_data={args.data.eval_data!r}: no item could be read, so there is no loss to report."
        )
    return total


def _gain(on: LossParts, off: LossParts, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """What updates take from the loss with sums of weights `[Q]`, item by item, and how sure that is.

    Both passes hear the same items: the error of the difference is far smaller than either loss's own, so that a
    contribution shows here long before it does in the loss.
    """
    differences = (off.sums - on.sums).double()[on.weights.any(1)]
    divisors = torch.cat([weights[:1], weights[1:].sum().expand(len(weights) - 1)])  # text and audio, as in the loss
    differences = (differences / torch.where(divisors > 0, divisors, 1.0)).sum(1)
    ones = torch.ones_like(differences)
    number, total, squares = sum_over_ranks(torch.stack([ones, differences, differences**2]).sum(1)).unbind()
    if number < 2:
        return {"ttt_gain": total}
    error = ((squares - total**2 / number).clamp(min=0) * number / (number - 1)).sqrt()
    return {"ttt_gain": total, "ttt_gain_error": error}
