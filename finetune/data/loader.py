"""Batches for training, in one global order that any number of ranks shares out, and for evaluation.

The order of items depends on the seed and the data alone. Item g of it goes to rank g mod W, so two ranks with batches
of b see, together, what one rank with batches of 2b sees, and a run continues on another number of ranks.

Shapes: `B` items of a batch, `K` = 1 + n_q rows, `T` steps of a segment.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from moshi.conditioners import ConditionAttributes

from ..common.errors import ConfigError
from ..settings.schema import TrainArgs
from .reader import Gather, ItemReader
from .segments import Listing
from .tokenize import Item, SpeechTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Codes `[B, K, T]` int64 on the CPU, and one entry per row when the model takes conditions."""

    codes: torch.Tensor
    condition_attributes: list[ConditionAttributes] | None


def collate(items: list[Item]) -> Batch:
    """One batch of `items`, in their order."""
    conditions = [item.conditions for item in items if item.conditions is not None]
    return Batch(torch.cat([item.codes for item in items]), conditions or None)


class TrainLoader:
    """Endless batches of `args.data.train_data`. Iterate it once; `state_dict()` is the position after the last batch.

    Each source appears by its share. Within a source every segment comes once per epoch, in the order of the lists, or
    shuffled anew each epoch with `args.data.shuffle`. A broken item is replaced by the next one of its epoch, which
    shifts nothing: the position in the data never depends on what was broken.

    Args:
        seed: of the shuffling; `args.seed` if None.
        gather: as in `ItemReader`; without it a rank stops for what it has found itself.

    Attributes:
        listing: the segments of all sources.

    Raises:
        BrokenData: on construction or from iterating, on all ranks, when more than 5 % of the items are broken.
    """

    def __init__(
        self,
        args: TrainArgs,
        tokenizer: SpeechTokenizer,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        gather: Gather | None = None,
    ):
        self.tokenizer, self.batch_size = tokenizer, args.batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle = args.seed if seed is None else seed, args.data.shuffle
        planned = args.max_steps * args.num_microbatches * args.batch_size * world_size
        self.listing = Listing(args.data.train_data, tokenizer, quiet=rank > 0)
        self._reader = ItemReader(self.listing, tokenizer, planned=planned, gather=gather)
        self._segments = self.listing.segments
        total = sum(source.share for source in self.listing.sources)
        self._shares = [source.share / total for source in self.listing.sources]
        self._drawn = [0] * len(self._shares)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next `batch_size` items of this rank, `world_size` times as many of the global order."""
        positions = [self._advance() for _ in range(self.batch_size * self.world_size)]
        items = [self._load(*position) for position in positions[self.rank :: self.world_size]]
        self._reader.check()
        return collate(items)

    @property
    def consumed(self) -> int:
        """Items of the global order behind all ranks together."""
        return sum(self._drawn)

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank, and what it is a position in."""
        return {
            "consumed": self.consumed,
            "drawn": list(self._drawn),
            "items": [len(segments) for segments in self._segments],
            "seed": self.seed,
            "shuffle": self.shuffle,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues after the item that `state` was taken at, on any number of ranks.

        Other data or another order than at that time continues at the same count, with a warning.

        Raises:
            ValueError: when the number of sources differs.
        """
        if len(state["drawn"]) != len(self._drawn):
            raise ConfigError(
                f"data.train_data: {len(self._drawn)} sources, but the checkpoint was trained on "
                f"{len(state['drawn'])}; restore data.train_data, or start a new run with init_from."
            )
        for name, now in self.state_dict().items():
            if name not in ("consumed", "drawn") and state[name] != now:
                logger.warning(
                    "Data order: %s is %r, was %r in the checkpoint; not the same items.", name, now, state[name]
                )
        self._drawn = list(state["drawn"])

    def _advance(self) -> tuple[int, int]:
        """The next place in the global order: a source, and how many items were drawn from it before.

        The source furthest behind its share comes next, so that shares hold at any time and no randomness is kept.
        """
        behind = [share * (self.consumed + 1) - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
        source = behind.index(max(behind))
        self._drawn[source] += 1
        return source, self._drawn[source] - 1

    def _load(self, source: int, place: int) -> Item:
        segments = self._segments[source]
        epoch, position = divmod(place, len(segments))
        order = self._order(source, epoch)
        while not self._reader.hopeless:  # so one is left
            item = self._reader.read(segments[order[position % len(segments)]])
            if item is not None:
                return item
            position += 1
        return self.tokenizer.blank()  # no batch comes of it

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """Which segment stands at each position of an epoch."""
        if self._orders.get(source, (None,))[0] != epoch:
            number = len(self._segments[source])
            generator = np.random.default_rng([self.seed, source, epoch])
            order = generator.permutation(number) if self.shuffle else np.arange(number)
            self._orders[source] = (epoch, order)
        return self._orders[source][1]


class EvalLoader:
    """All of `args.data.eval_data` once, in order. Each iteration starts anew.

    Every rank yields equally many batches of equal shape, as collective operations need it: places without an item,
    at the end or because it is broken, hold blank rows that carry no loss.

    Args:
        gather: as in `ItemReader`; without it a rank stops for what it has found itself.

    Attributes:
        listing: the segments of all sources.
        mine: the segments of this rank, in the order of the rows of its batches; rows after them are blank.

    Raises:
        BrokenData: on construction or from iterating, on all ranks, when more than 5 % of the items are broken.
    """

    def __init__(
        self,
        args: TrainArgs,
        tokenizer: SpeechTokenizer,
        *,
        rank: int = 0,
        world_size: int = 1,
        gather: Gather | None = None,
    ):
        self.tokenizer, self.batch_size = tokenizer, args.batch_size
        self.rank, self.world_size = rank, world_size
        self.listing = Listing(args.data.eval_data, tokenizer, quiet=rank > 0)
        self._reader = ItemReader(self.listing, tokenizer, gather=gather)
        self.segments = [segment for segments in self.listing.segments for segment in segments]
        self.mine = self.segments[rank::world_size]

    def __len__(self) -> int:
        return -(-len(self.segments) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Batch]:
        for index in range(len(self)):
            here = self.mine[index * self.batch_size : (index + 1) * self.batch_size]
            items = [self._reader.read(segment) or self.tokenizer.blank() for segment in here]
            self._reader.check()
            yield collate(items + [self.tokenizer.blank()] * (self.batch_size - len(items)))
