"""Which items are evaluated, and how several ranks put together what each of them found."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from ...common.distributed import Context, gather_over_ranks
from ...data.broken import BrokenCount

T = TypeVar("T")


def select(items: Sequence[T], max_items: int | None, seed: int) -> list[T]:
    """All items, or `max_items` of them drawn by `seed`, in their order."""
    if max_items is None or max_items >= len(items):
        return list(items)
    drawn = np.random.default_rng(seed).choice(len(items), size=max_items, replace=False)
    return [items[index] for index in sorted(drawn)]


def merge(records: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Each record with what `others` adds to it; what could not be used in one of the two is not used."""
    return {
        key: others[key] if "skipped" in others[key] else record if "skipped" in record else record | others[key]
        for key, record in records.items()
    }


def gather(mine: dict[str, Any], ctx: Context) -> dict[str, Any]:
    """The records of all ranks together, the same on each."""
    return dict(mine) if ctx.world_size == 1 else dict(gather_over_ranks(list(mine.items())))


def count_skipped(broken: BrokenCount, record: dict[str, Any]) -> None:
    """Counts `record` in `broken` when its item was skipped, and raises BrokenData when those are too many."""
    if "skipped" in record:
        broken.add(record["skipped"])
        broken.refuse()
