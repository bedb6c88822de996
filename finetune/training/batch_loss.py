"""The loss of one batch, and how much its positions count in it, with the settings of a run."""

from typing import Any

import torch
from moshi.models.lm import LMOutput
from torch import nn

from ..common.distributed import Context
from ..data.loader import Batch
from ..model.conditions import condition_tensors
from ..model.loss import LossParts, compute_loss, position_weights, predicted_positions
from ..settings.schema import TrainArgs


def forward(model: nn.Module, batch: Batch, ctx: Context) -> tuple[LMOutput, torch.Tensor]:
    """What the model makes of this rank's `batch`, and the codes of the batch on its device."""
    codes = batch.codes.to(ctx.device)
    return model(codes=codes, condition_tensors=condition_tensors(model, batch.condition_attributes)), codes


def forward_loss(model: nn.Module, batch: Batch, args: TrainArgs, ctx: Context) -> LossParts:
    """One forward pass over this rank's `batch`: the weighted sums of its loss."""
    output, codes = forward(model, batch, ctx)
    return batch_loss(model, output, codes, args)


def batch_loss(model: nn.Module, output: LMOutput, codes: torch.Tensor, args: TrainArgs) -> LossParts:
    """`compute_loss` with the settings of `args` and the special tokens of `model`."""
    return compute_loss(output, codes, dep_q=model.dep_q, **_weighting(model, args))


@torch.no_grad()
def batch_counts(model: nn.Module, batch: Batch, args: TrainArgs, ctx: Context) -> torch.Tensor:
    """The counts `[Q]` that `forward_loss` will return for `batch`; they follow from its codes, without a pass."""
    codes = batch.codes.to(ctx.device)
    masks = predicted_positions(codes, model.delays[: 1 + model.dep_q], model.zero_token_id)
    return torch.stack([weight.sum() for weight in position_weights(codes, masks, **_weighting(model, args))])


def _weighting(model: nn.Module, args: TrainArgs) -> dict[str, Any]:
    return {
        "text_padding_weight": args.text_padding_weight,
        "first_codebook_weight_multiplier": args.first_codebook_weight_multiplier,
        "text_padding_ids": (model.text_padding_token_id, model.end_of_text_padding_id),
    }
