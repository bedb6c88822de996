"""The one loss of training and evaluation: cross entropy in nats, of the text and of Moshi's codebooks.

Shapes: `B` items, `T` steps, `K` = 1 + n_q rows of codes; `Q` = 1 + dep_q rows that are predicted, the text first.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.lm import LMOutput
from torch.nn import functional as F


@dataclass(frozen=True)
class LossParts:
    """Weighted sums of the cross entropy, and of the weights, from which every mean follows. Nothing waits for the GPU.

    The sums of several batches or ranks may be added up; the means are then those of all their positions together.

    Args:
        sums: `[Q]` float32, cross entropy in nats, each position times its weight; with gradient.
        counts: `[Q]` float32, sums of the positions' weights, without gradient. A row without any position has zero in
            both.
    """

    sums: torch.Tensor
    counts: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """Scalar: the text's loss plus the audio's."""
        return self.normalised_by(self.counts)

    @property
    def text(self) -> torch.Tensor:
        """Scalar: weighted mean over the text's positions."""
        return _ratio(self.sums[0], self.counts[0])

    @property
    def audio(self) -> torch.Tensor:
        """Scalar: weighted mean over all codebooks' positions."""
        return _ratio(self.sums[1:].sum(), self.counts[1:].sum())

    def normalised_by(self, counts: torch.Tensor) -> torch.Tensor:
        """Scalar: the share of this batch in a loss with other counts `[Q]`: those of all ranks and microbatches.

        The shares of all of them add up to the loss of the global batch, whatever the number of ranks.
        """
        return _ratio(self.sums[0], counts[0]) + _ratio(self.sums[1:].sum(), counts[1:].sum())


def compute_loss(
    output: LMOutput,
    codes: torch.Tensor,
    *,
    dep_q: int,
    text_padding_weight: float = 0.5,
    first_codebook_weight_multiplier: float = 1.0,
    text_padding_ids: Collection[int] = (3, 0),
) -> LossParts:
    """Cross entropy over the masked positions of `output`, as in moshi-finetune: text and audio each normalised.

    Args:
        output: of `LMModel.forward(codes)`. Where a mask is False the logits may be anything, NaN included.
        codes: `[B, K, T]` int64: text, then Moshi's `dep_q` codebooks, then those of the user, which are not predicted.
        text_padding_weight: weight of the text positions whose target is in `text_padding_ids`; others have 1.
        first_codebook_weight_multiplier: weight of the first codebook; the others have 1.
        text_padding_ids: padding and end of padding.
    """
    rows = position_losses(
        output,
        codes,
        dep_q=dep_q,
        text_padding_weight=text_padding_weight,
        first_codebook_weight_multiplier=first_codebook_weight_multiplier,
        text_padding_ids=text_padding_ids,
    )
    sums, counts = zip(*(((nats * weight).sum(), weight.sum()) for nats, weight in rows), strict=True)
    return LossParts(torch.stack(sums), torch.stack(counts))


def position_losses(
    output: LMOutput, codes: torch.Tensor, *, dep_q: int, **weighting: Any
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What `compute_loss` sums, with its arguments: nats and weights `[B, T]`, at least float32, row after row.

    One row at a time takes less memory than all at once. Where a mask is False the weight is 0, the nats mean nothing.
    """
    masks = torch.cat([output.text_mask, output.mask[:, :dep_q]], 1)
    for row, weight in enumerate(position_weights(codes, masks, **weighting)):
        logits = output.logits[:, row - 1] if row else output.text_logits[:, 0]
        yield _nats(logits, codes[:, row], masks[:, row]), weight


def position_weights(
    codes: torch.Tensor,
    masks: torch.Tensor,
    *,
    text_padding_weight: float,
    first_codebook_weight_multiplier: float,
    text_padding_ids: Collection[int],
) -> Iterator[torch.Tensor]:
    """How much each position counts in the loss: `[B, T]` float32, row after row.

    Args:
        codes: `[B, K, T]`, as for `compute_loss`.
        masks: `[B, Q, T]` bool, which positions are predicted; the others have the weight 0.
    """
    text, weight = codes[:, 0], masks[:, 0].float()
    for token in text_padding_ids:
        weight = torch.where(text == token, weight * text_padding_weight, weight)
    yield weight
    for row in range(1, masks.shape[1]):
        yield masks[:, row].float() * (first_codebook_weight_multiplier if row == 1 else 1.0)


def predicted_positions(codes: torch.Tensor, delays: Sequence[int], zero_token_id: int) -> torch.Tensor:
    """`[B, Q, T]` bool: the masks that `LMModel.forward(codes)` will return, known before from the codes alone.

    Args:
        codes: `[B, K, T]`.
        delays: of the Q rows that are predicted, the text's first. The last steps of a delayed row are not predicted.
        zero_token_id: the code of padding.
    """
    rows, steps = codes[:, : len(delays)], torch.arange(codes.shape[2], device=codes.device)
    heard = steps < codes.shape[2] - torch.tensor(delays, device=codes.device)[:, None]
    return (rows != zero_token_id) & heard


def perplexity(nats: torch.Tensor) -> torch.Tensor:
    """exp of a loss in nats."""
    return nats.exp()


def _nats(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Cross entropy `[B, T]` of one row: logits `[B, T, card]`, the others `[B, T]`.

    Invalid logits are replaced before the softmax: zero times the gradient of NaN would be NaN.
    """
    logits = logits.masked_fill(~mask[..., None], 0.0)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = target.masked_fill(~mask, 0)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)


def _ratio(total: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`total / weight`, or 0 where there is no weight."""
    return total / torch.where(weight > 0, weight, 1.0)
