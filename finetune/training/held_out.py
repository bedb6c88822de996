"""Evaluation: the training loss over all held-out data, with TTT's updates and without, and how sure a difference is.

Shapes: `I` items (segments) of this rank, `Q` = 1 + dep_q rows that are predicted, the text first.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from moshi.models.lm import LMOutput
from torch import nn

import moshi_patch

from ..common.distributed import Context, gather_over_ranks, sum_over_ranks
from ..data.broken import BrokenData
from ..data.loader import EvalLoader
from ..model.loss import LossParts, perplexity
from ..settings.schema import TrainArgs
from .batch_loss import batch_loss, forward

MIN_RECORDINGS = 5
"""No standard error from fewer recordings."""

Shares = dict[str, float]
"""By the name of each held-out recording, what it adds to the loss over all of them, in nats."""


@dataclass
class Evaluation:
    """What one evaluation found.

    Args:
        values: for the metrics, see `evaluate`.
        shares: of `values["loss"]`.
    """

    values: dict[str, float]
    shares: Shares


def evaluate(
    model: nn.Module, loader: EvalLoader, args: TrainArgs, ctx: Context, stop: Callable[[], object] = bool
) -> Evaluation | None:
    """Means over all evaluation data of all ranks, in nats; all ranks call it and all get the same.

    Its values are `loss`, `text_loss`, `audio_loss`, `perplexity`, `text_perplexity`; with TTT also `loss_updates_off`
    and `text_loss_updates_off`, of the same weights with nothing learnt from the stream; `ttt_reliance`, the loss with
    updates less the loss without (negative: these weights predict better with them), and `ttt_reliance_error`, its
    standard error over recordings, from `MIN_RECORDINGS` on.

    Args:
        stop: asked before each batch; anything true gives the evaluation up. The same on all ranks.

    Returns:
        None when it was given up.

    Raises:
        BrokenData: when not one item could be read.
    """
    training = model.training
    model.eval()
    try:
        items = _items(model, loader, args, ctx, stop)
        if items is None:
            return None
        total = _total(items, args)
        values = {
            "loss": total.loss,
            "text_loss": total.text,
            "audio_loss": total.audio,
            "perplexity": perplexity(total.loss),
            "text_perplexity": perplexity(total.text),
        }
        shares, reliance = _shares(loader, items, total.counts), {}
        if moshi_patch.ttt_memories(model):
            with moshi_patch.ttt_updates(model, enabled=False):
                items_off = _items(model, loader, args, ctx, stop)
            if items_off is None:
                return None
            off = _total(items_off, args)
            values |= {"loss_updates_off": off.loss, "text_loss_updates_off": off.text}
            reliance = difference("ttt_reliance", shares, _shares(loader, items_off, total.counts))
    finally:
        model.train(training)
    return Evaluation({name: value.item() for name, value in values.items()} | reliance, shares)


def difference(name: str, ours: Shares, theirs: Shares) -> dict[str, float]:
    """The loss of `ours` less that of `theirs` on the same recordings, as `name`, and `name_error` if that is known.

    Both losses heard the same recordings, so the error of their difference is far smaller than either loss's own. The
    error is that of a sum of independent recordings; from fewer than `MIN_RECORDINGS` there is none.

    Raises:
        ValueError: when they are of different recordings.
    """
    if ours.keys() != theirs.keys():
        raise ValueError("losses of different recordings cannot be compared.")
    each = torch.tensor([ours[recording] - theirs[recording] for recording in ours], dtype=torch.float64)
    found, number = {name: each.sum().item()}, len(each)
    if number >= MIN_RECORDINGS:
        found[f"{name}_error"] = (each.std() * number**0.5).item()
    return found


@torch.no_grad()
def _items(
    model: nn.Module, loader: EvalLoader, args: TrainArgs, ctx: Context, stop: Callable[[], object]
) -> LossParts | None:
    """Of each of this rank's items by itself: sums and counts are `[I, Q]`; items that are missing count nothing."""
    found = []
    for batch in loader:
        if stop():
            return None
        output, codes = forward(model, batch, ctx)
        for row in (slice(index, index + 1) for index in range(len(codes))):
            parts = (output.logits, output.mask, output.text_logits, output.text_mask)
            found.append(batch_loss(model, LMOutput(*(part[row] for part in parts)), codes[row], args))
    blank = torch.zeros(0, 1 + model.dep_q, device=ctx.device)
    sums, counts = ([getattr(item, name)[None] for item in found] for name in ("sums", "counts"))
    return LossParts(torch.cat([blank, *sums]), torch.cat([blank, *counts]))


def _total(items: LossParts, args: TrainArgs) -> LossParts:
    total = LossParts(sum_over_ranks(items.sums.sum(0)), sum_over_ranks(items.counts.sum(0)))
    if not total.counts.any():  # the same on all ranks
        raise BrokenData(
            f"data.eval_data={args.data.eval_data!r}: no item could be read, so there is no loss to report."
        )
    return total


def _shares(loader: EvalLoader, items: LossParts, counts: torch.Tensor) -> Shares:
    """What each recording of all ranks adds to a loss with the counts `[Q]`."""
    divisors = torch.cat([counts[:1], counts[1:].sum().expand(len(counts) - 1)])  # text and audio, as in the loss
    each = (items.sums.double() / torch.where(divisors > 0, divisors, 1.0)).sum(1)
    heard = items.counts.any(1)
    mine = [
        (os.path.abspath(segment.path), share)
        for segment, share, counts_at_all in zip(loader.mine, each.tolist(), heard.tolist(), strict=False)
        if counts_at_all
    ]
    everyone = sorted(gather_over_ranks(mine))  # in one order on any number of ranks
    names = recording_names([path for path, _ in everyone])
    shares: Shares = defaultdict(float)
    for path, share in everyone:
        shares[names[path]] += share
    return dict(shares)


def recording_names(paths: list[str]) -> dict[str, str]:
    """By its absolute path, the name of each recording: what of it the folder of all does not say.

    So the names stay when the data are moved, or are called by another path.
    """
    folder = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return {path: os.path.relpath(path, folder) for path in paths}
