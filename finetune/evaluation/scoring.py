"""The standard evaluation: the loss of whole recordings, each one stream, under every condition, by position.

Shapes: `B` streams of a batch, `K` = 1 + n_q rows of codes, `T` steps; `Q` = 1 + dep_q predicted rows.
"""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from moshi.models import LMModel
from tqdm import tqdm

from ..common.distributed import Context
from ..common.errors import ConfigError
from ..data.broken import BrokenCount
from ..data.loader import collate
from ..data.reader import ItemReader
from ..data.segments import Segment
from ..data.tokenize import Item
from ..model.conditions import condition_tensors
from ..model.stream import StepLosses, score_stream
from ..settings.evaluation import EvalArgs
from ..settings.schema import RATES, STEPS_PER_SECOND
from .conditions import under
from .result_store import ResultStore
from .streams import Streams, item_id

logger = logging.getLogger(__name__)

MINUTES = (0, 1, 2, 4, 8, 16, 30, math.inf)
"""Edges of the stretches of a stream that are reported by themselves."""


def score_streams(
    model: LMModel,
    streams: Streams,
    kinds: dict[str, str],
    args: EvalArgs,
    ctx: Context,
    store: ResultStore,
) -> None:
    """Scores this rank's share of what `store` does not have yet, and stores it stream by stream.

    Args:
        kinds: by condition, under which name it is stored.

    Raises:
        BrokenData: when more than 5 % of all recordings cannot be read.
        ConfigError: for a loss that is not finite.
    """
    pending = [
        (segment, seconds)
        for segment, seconds in zip(streams.segments, streams.seconds, strict=True)
        if any(store.get(kind, item_id(segment)) is None for kind in kinds.values())
    ]
    mine = pending[ctx.rank :: ctx.world_size]
    bar = tqdm(
        total=len(kinds) * sum(seconds for _, seconds in mine) + 1e-3,  # more than the sum of its parts, rounded
        desc=" / ".join(kinds),
        disable=ctx.rank != 0 or not mine,
        bar_format="{desc}: {percentage:3.0f}% {bar} {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}]",
    )
    with bar:
        for first in range(0, len(mine), args.eval_batch_size):
            part = mine[first : first + args.eval_batch_size]
            batch = list(_loaded([segment for segment, _ in part], streams.reader, model.zero_token_id))
            streams.reader.check()
            seconds, longest = sum(seconds for _, seconds in part), max((i.codes.shape[2] for _, i in batch), default=1)
            progress = partial(_advance, bar, seconds / longest)
            for condition, kind in kinds.items():
                if all(store.get(kind, item_id(segment)) for segment, _ in batch):  # also when none could be read
                    progress(longest)
                    continue
                for (segment, _), losses in zip(batch, _score(model, batch, condition, args, progress), strict=True):
                    values = _values(losses, streams.curve_steps)
                    refuse_broken_loss(values, condition, segment, args.ttt.kind)
                    store.add(kind, item_id(segment), values)


def _advance(bar: tqdm, seconds_per_step: float, steps: int) -> None:
    bar.update(seconds_per_step * steps)


def _loaded(segments: list[Segment], reader: ItemReader, zero_id: int) -> Iterator[tuple[Segment, Item]]:
    """Those that can be read, without the zero tokens that fill up an item."""
    for segment in segments:
        item = reader.read(segment)
        if item is not None:
            heard = (item.codes[0] != zero_id).any(0).nonzero()
            yield segment, Item(item.codes[..., : int(heard[-1]) + 1], item.conditions)


def _score(
    model: LMModel, batch: list[tuple[Segment, Item]], condition: str, args: EvalArgs, progress: Callable[[int], None]
) -> Iterator[StepLosses]:
    """The losses of each stream of a batch."""
    lengths = [item.codes.shape[2] for _, item in batch]
    padded = [
        Item(torch.nn.functional.pad(item.codes, (0, max(lengths) - steps), value=model.zero_token_id), item.conditions)
        for (_, item), steps in zip(batch, lengths, strict=True)
    ]
    together = collate(padded)
    with under(condition, model):
        losses = score_stream(
            model,
            together.codes,
            condition_tensors=condition_tensors(model, together.condition_attributes),
            segment_steps=args.segment_steps,
            text_padding_weight=args.text_padding_weight,
            first_codebook_weight_multiplier=args.first_codebook_weight_multiplier,
            progress=progress,
        )
    for index, steps in enumerate(lengths):
        nats, weights = losses.nats[index : index + 1, :, :steps], losses.weights[index : index + 1, :, :steps]
        for row, delay in enumerate(model.delays[: weights.shape[1]]):
            weights[:, row, max(steps - delay, 0) :] = 0.0  # predicted after the end: alone it would not be
        yield StepLosses(nats, weights)


def _values(losses: StepLosses, curve_steps: int) -> dict[str, Any]:
    """What is kept of a stream: sums of all of it, of each stretch of minutes, and of each point of the plot.

    A pair of sums is `[nats [Q], weights [Q]]`; in the plot Q is 2, the text and all of the audio.
    """
    steps = losses.nats.shape[2]
    edges = [min(round(60 * STEPS_PER_SECOND * edge) if math.isfinite(edge) else steps, steps) for edge in MINUTES]
    stretches = [_pair(losses, first, end) if end > first else None for first, end in pairwise(edges)]
    points = [_pair(losses, first, first + curve_steps) for first in range(0, steps, curve_steps)]
    curve = [[[sums[0], sum(sums[1:])] for sums in pair] for pair in points]
    return {"steps": steps, "sums": _pair(losses, 0, steps), "by_position": stretches, "curve": curve}


def refuse_broken_loss(values: dict[str, Any], condition: str, segment: Segment, memory: str) -> None:
    """Raises a ConfigError when the loss of a stream is not finite.

    Args:
        memory: its kind, of the model that was scored.
    """
    if not np.isfinite(values["sums"]).all():
        raise ConfigError(
            f"{segment.path}: its loss is not finite ({condition}). `python -m finetune.doctor` tells whether the "
            f"weights are; where updates alone break it, a lower --ttt.{RATES[memory]} shows."
        )


def _pair(losses: StepLosses, first: int, end: int) -> list[list[float]]:
    parts = losses.parts(first, end)
    return [parts.sums.tolist(), parts.counts.tolist()]


def scored_streams(streams: Streams, kinds: dict[str, str], store: ResultStore) -> list[Segment]:
    """The streams that were scored under every condition.

    Raises:
        BrokenData: when more than 5 % were not, having been found broken by any of the ranks.
    """
    found = [one for one in streams.segments if all(store.get(kind, item_id(one)) for kind in kinds.values())]
    broken = BrokenCount("data.eval_data", "streams", len(streams.segments), "; warnings before name them")
    broken.add("", len(streams.segments) - len(found))
    broken.refuse()
    return found
