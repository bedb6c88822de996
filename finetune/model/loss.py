"""The one loss of training and evaluation: cross entropy in nats, of the text and of Moshi's codebooks.

Shapes: `B` items, `T` steps, `K` = 1 + n_q rows of codes; `Q` = 1 + dep_q rows that are predicted, the text first.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from moshi.models.lm import LMOutput
from torch.nn import functional as F


@dataclass(frozen=True)
class LossParts:
    """Weighted sums of the cross entropy and of the weights, from which every mean follows. Nothing waits for the GPU.

    Parts of several batches or ranks are added (`+`), and the means are then those of all their positions together.

    Args:
        sums: `[Q]` float32, weighted cross entropy in nats, with gradient.
        weights: `[Q]` float32, sums of the weights, without gradient. A row without any position has zero in both.
    """

    sums: torch.Tensor
    weights: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """Scalar: the text's loss plus the audio's."""
        return self.normalised_by(self.weights)

    @property
    def text(self) -> torch.Tensor:
        """Scalar: weighted mean over the text's positions."""
        return _ratio(self.sums[0], self.weights[0])

    @property
    def audio(self) -> torch.Tensor:
        """Scalar: weighted mean over all codebooks' positions."""
        return _ratio(self.sums[1:].sum(), self.weights[1:].sum())

    @property
    def per_codebook(self) -> torch.Tensor:
        """`[Q]`: the mean of each row by itself, the text first. The first codebook's multiplier cancels out."""
        return _ratio(self.sums, self.weights)

    def normalised_by(self, weights: torch.Tensor) -> torch.Tensor:
        """Scalar: the loss with other sums of weights `[Q]`, such as those of all ranks and microbatches together.

        Summed over them, it is the loss of the global batch, whatever the number of ranks.
        """
        return _ratio(self.sums[0], weights[0]) + _ratio(self.sums[1:].sum(), weights[1:].sum())

    def detach(self) -> "LossParts":
        """The same without gradient."""
        return LossParts(self.sums.detach(), self.weights)

    def __add__(self, other: "LossParts") -> "LossParts":
        return LossParts(self.sums + other.sums, self.weights + other.weights)


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
    sums, weights = zip(*(((nats * weight).sum(), weight.sum()) for nats, weight in rows), strict=True)
    return LossParts(torch.stack(sums), torch.stack(weights))


def position_losses(
    output: LMOutput,
    codes: torch.Tensor,
    *,
    dep_q: int,
    text_padding_weight: float,
    first_codebook_weight_multiplier: float,
    text_padding_ids: Collection[int],
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What `compute_loss` sums, with its arguments: nats and weights `[B, T]`, at least float32, row after row.

    One row at a time takes less memory than all at once. Where a mask is False the weight is 0, the nats mean nothing.
    """
    target, mask = codes[:, 0], output.text_mask[:, 0]
    weight = mask.float()
    for token in text_padding_ids:
        weight = torch.where(target == token, weight * text_padding_weight, weight)
    yield _nats(output.text_logits[:, 0], target, mask), weight
    for codebook in range(dep_q):
        target, mask = codes[:, 1 + codebook], output.mask[:, codebook]
        weight = mask.float() * (first_codebook_weight_multiplier if codebook == 0 else 1.0)
        yield _nats(output.logits[:, codebook], target, mask), weight


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
