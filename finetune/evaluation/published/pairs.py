"""Which of two recordings a model finds likelier: one number per pair and condition, then accuracies with intervals."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from ...common.distributed import Context, on_all_ranks
from ...data.audio import durations
from ...data.broken import BrokenCount, BrokenItem
from ...settings.evaluation import EvalArgs
from ..conditions import OFF, ON, difference_name, under
from ..result_store import ResultStore
from ..statistics import mean_interval
from .audio import MonoTokenizer
from .likelihood import Likelihood, Reach
from .sets import Pair, PairSet
from .share import count_skipped, gather, merge, select

logger = logging.getLogger(__name__)

SIDES = ("correct", "incorrect")


def score_pairs(
    name: str,
    found: PairSet,
    args: EvalArgs,
    likelihood: Likelihood,
    tokenizer: MonoTokenizer,
    ctx: Context,
    *,
    store: ResultStore,
) -> "PairScores":
    """The likelihoods of both recordings of all pairs under every condition; all ranks call it, all get them.

    Args:
        name: of the set.
        found: the set, as `sets.load_pairs` reads it.
        store: holds the scores of an evaluation that was interrupted, and takes new ones.

    Raises:
        BrokenData: when more than 5 % of its pairs cannot be used.
    """
    pairs = select(found.pairs, args.paper.max_items, args.seed)
    for problem in found.problems if ctx.rank == 0 else ():
        logger.warning("Skipped: %s", problem)
    _refuse_broken_list(name, found)
    batches = list(_batches(pairs, tokenizer, args.paper.batch_steps))[ctx.rank :: ctx.world_size]

    def score_mine() -> dict[str, Any]:
        mine: dict[str, Any] = {}
        broken = BrokenCount(f"paper.{name}", "pairs", len(pairs))
        scored_as = f"paper/{name}/{'+'.join(likelihood.conditions)}"
        with tqdm(total=sum(map(len, batches)), desc=name, unit="pair", disable=ctx.rank != 0) as bar:
            for batch in batches:
                records = [store.get(scored_as, pair.id) for pair in batch]
                if not all(records):  # the whole batch anew: its numbers depend on its shape
                    records = _score(batch, likelihood, tokenizer)
                    for pair, record in zip(batch, records, strict=True):
                        store.add(scored_as, pair.id, record)
                for pair, record in zip(batch, records, strict=True):
                    mine[pair.id] = record
                    count_skipped(broken, record)
                bar.update(len(batch))
        return mine

    everything = gather(on_all_ranks(ctx, score_mine), ctx)
    broken = BrokenCount(f"paper.{name}", "pairs", len(pairs))
    for pair in pairs:
        count_skipped(broken, everything[pair.id])
    return PairScores(name, pairs, everything, found.problems)


def _refuse_broken_list(name: str, found: PairSet) -> None:
    """Raises BrokenData when too much of the list itself cannot be used, before any file is read."""
    broken = BrokenCount(f"paper.{name}", "pairs", len(found.pairs) + len(found.problems))
    for problem in found.problems:
        broken.add(problem)
    broken.refuse()


def _batches(pairs: list[Pair], tokenizer: MonoTokenizer, batch_steps: int) -> Iterator[list[Pair]]:
    """Pairs of like length together, the longest first; the same on every rank and every machine.

    What a batch is made of does not depend on the number of ranks: on two the numbers are those of one, bit for bit.
    """
    seconds = durations(getattr(pair, side) for pair in pairs for side in SIDES)
    # A file without a duration is broken; that is found out, and said, when it is read.
    steps = [tokenizer.steps(value or 0.0) + tokenizer.tail for value in seconds]
    longest = [max(both) for both in zip(steps[::2], steps[1::2], strict=True)]
    order = sorted(range(len(pairs)), key=lambda index: -longest[index])
    while order:
        size = max(1, batch_steps // (2 * max(longest[order[0]], 1)))
        yield [pairs[index] for index in order[:size]]
        order = order[size:]


def _score(batch: list[Pair], likelihood: Likelihood, tokenizer: MonoTokenizer) -> list[dict[str, Any]]:
    """A record per pair: `{"steps": [correct, incorrect], CONDITION: [nats, nats]}`, or `{"skipped": why}`."""
    records: list[dict[str, Any]] = []
    codes: list[torch.Tensor] = []
    for pair in batch:
        try:
            both = [tokenizer(getattr(pair, side)) for side in SIDES]
        except BrokenItem as error:
            logger.warning("Skipped: %s", error)
            records.append({"skipped": str(error)})
            continue
        codes += both
        records.append({"steps": [item.shape[-1] - tokenizer.tail for item in both]})
    if codes:
        whole = [record for record in records if "steps" in record]
        for name in likelihood.conditions:
            with under(name, likelihood.model):
                nats = rearrange(likelihood(codes).sum(1), "(pair member) -> pair member", member=2).tolist()
            for record, both in zip(whole, nats, strict=True):
                record[name] = both
    return records


@dataclass(frozen=True)
class PairScores:
    """Records of a set by pair id, as `_score` makes them, perhaps with those of another model."""

    name: str
    pairs: list[Pair]
    records: dict[str, dict[str, Any]]
    problems: list[str]

    def beside(self, other: "PairScores") -> "PairScores":
        """With the conditions of `other`, of the same pairs, behind one's own."""
        return PairScores(self.name, self.pairs, merge(self.records, other.records), self.problems)

    def summary(self, args: EvalArgs, reach: Reach) -> dict[str, Any]:
        """Accuracies with their intervals, by group too, and what stands behind them; ready for JSON."""
        used = [pair for pair in self.pairs if "steps" in self.records[pair.id]]
        names = [name for name in self.records[used[0].id] if name != "steps"]
        right = {name: np.array([self._right(pair, name, args) for pair in used]) for name in names}
        learns = np.array([any(map(reach.learns, self.records[pair.id]["steps"])) for pair in used])
        skipped = [self.records[pair.id]["skipped"] for pair in self.pairs if "skipped" in self.records[pair.id]]
        result: dict[str, Any] = {
            "meaning": args.paper.statement(args.first_codebook_weight_multiplier),
            "pairs": len(used),
            "items": len({pair.item for pair in used}),
            "skipped": self.problems + skipped,
            **{name: _accuracy(used, right[name], args) for name in names},
            "groups": _groups(used, right),
        }
        for other in names[1:]:  # of errors, so that negative is better here too
            result[difference_name(names[0], other)] = _accuracy(used, right[other] - right[names[0]], args)
        if {ON, OFF} <= right.keys():
            result["beyond_first_chunk"] = self._control(used, right, learns)
        result["per_pair"] = {pair.id: self.records[pair.id] for pair in self.pairs}
        return result

    def _right(self, pair: Pair, name: str, args: EvalArgs) -> float:
        record = self.records[pair.id]
        steps = record["steps"] if args.paper.normalise == "mean" else (1, 1)
        good, bad = (nats / count for nats, count in zip(record[name], steps, strict=True))
        return 1.0 if good < bad else 0.5 if good == bad else 0.0

    def _control(self, used: list[Pair], right: dict[str, np.ndarray], learns: np.ndarray) -> dict[str, Any]:
        """How many pairs updates can change at all, and the proof that they changed no others."""
        short = [self.records[pair.id] for pair, long in zip(used, learns, strict=True) if not long]
        change = (abs(on - off) for record in short for on, off in zip(record[ON], record[OFF], strict=True))
        result: dict[str, Any] = {
            "meaning": "pairs with a recording longer than TTT's first chunk; in others updates can change nothing",
            "share": float(learns.mean()),
            "pairs": int(learns.sum()),
            "largest_change_of_the_others_nats": max(change, default=0.0),
        }
        if learns.any():
            long = [pair for pair, learn in zip(used, learns, strict=True) if learn]
            result |= {name: float(_by_item(long, right[name][learns]).mean()) for name in (ON, OFF)}
        return result


def _by_item(pairs: list[Pair], values: np.ndarray) -> np.ndarray:
    """The mean of each item over its voices, in the order of first appearance."""
    items: dict[str, list[float]] = {}
    for pair, value in zip(pairs, values, strict=True):
        items.setdefault(pair.item, []).append(value)
    return np.array([np.mean(voices) for voices in items.values()])


def _accuracy(pairs: list[Pair], values: np.ndarray, args: EvalArgs) -> dict[str, float | None]:
    return mean_interval(_by_item(pairs, values), seed=args.seed, samples=args.bootstrap_samples)


def _groups(pairs: list[Pair], right: dict[str, np.ndarray]) -> dict[str, Any]:
    """`{breakdown: {"groups": {group: {"pairs": N, NAME: accuracy}}, "mean_over_groups": {NAME: accuracy}}}`."""
    result: dict[str, Any] = {}
    for breakdown in sorted({name for pair in pairs for name in pair.groups}):
        rows: dict[str, Any] = {}
        for group in sorted({pair.groups[breakdown] for pair in pairs if breakdown in pair.groups}):
            inside = [index for index, pair in enumerate(pairs) if pair.groups.get(breakdown) == group]
            members = [pairs[index] for index in inside]
            accuracies = {name: float(_by_item(members, values[inside]).mean()) for name, values in right.items()}
            rows[group] = {"pairs": len(inside), **accuracies}
        mean = {name: float(np.mean([row[name] for row in rows.values()])) for name in right}
        result[breakdown] = {"groups": rows, "mean_over_groups": mean}
    return result
