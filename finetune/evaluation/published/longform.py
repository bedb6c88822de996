"""Negative log-likelihood by length: how well a long recording is foreseen, the later the better if it is remembered.

A file's first minutes are heard as one stream, with the model's sliding attention window and in bounded memory.
"""

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ...common.distributed import Context, on_all_ranks
from ...data.audio import durations
from ...data.broken import BrokenCount, BrokenItem
from ...settings.evaluation import EvalArgs
from ..conditions import difference_name, under
from ..result_store import ResultStore
from ..statistics import mean_interval
from .audio import MonoTokenizer
from .likelihood import Likelihood, Reach
from .share import count_skipped, gather, merge, select

logger = logging.getLogger(__name__)

LENGTHS = (10, 30, 60, 120, 240, 480, 960, 1800)
"""Seconds at which a bucket ends and the next begins."""


def score_longform(
    files: list[Path],
    args: EvalArgs,
    likelihood: Likelihood,
    tokenizer: MonoTokenizer,
    ctx: Context,
    *,
    store: ResultStore,
) -> "LongScores":
    """The sums of each bucket of each file under each condition; all ranks call it, all get them.

    Args:
        files: the set, as `sets.load_files` reads it.
        store: holds the scores of an evaluation that was interrupted, and takes new ones.

    Raises:
        BrokenData: when more than 5 % of them cannot be used.
    """
    files = select(files, args.paper.max_items, args.seed)
    seconds = durations(files)
    longest_first = sorted(range(len(files)), key=lambda index: -(seconds[index] or 0.0))
    scored_as = f"paper/longform/{args.max_minutes:g} min/{'+'.join(likelihood.conditions)}"
    share = longest_first[ctx.rank :: ctx.world_size]

    def score_mine() -> dict[str, Any]:
        mine: dict[str, Any] = {}
        broken = BrokenCount("paper.longform", "files", len(files))
        for index in tqdm(share, desc="longform", unit="file", disable=ctx.rank != 0):
            name = str(files[index])
            record = store.get(scored_as, name)
            if record is None:
                record = _score(files[index], args, likelihood, tokenizer)
                store.add(scored_as, name, record)
            mine[name] = record
            count_skipped(broken, record)
        return mine

    records = gather(on_all_ranks(ctx, score_mine), ctx)
    broken = BrokenCount("paper.longform", "files", len(files))
    for record in records.values():
        count_skipped(broken, record)
    return LongScores([str(file) for file in files], records, edges(args, tokenizer), tokenizer.mimi.frame_rate)


def edges(args: EvalArgs, tokenizer: MonoTokenizer) -> list[int]:
    """The steps at which buckets begin and end: `LENGTHS` up to `args.max_minutes`, with 0 and the end."""
    end = 60 * args.max_minutes
    return [0, *(tokenizer.steps(length) for length in LENGTHS if length < end), tokenizer.steps(end)]


def _score(path: Path, args: EvalArgs, likelihood: Likelihood, tokenizer: MonoTokenizer) -> dict[str, Any]:
    """`{"steps": [of each bucket], CONDITION: [nats of each bucket]}`, or `{"skipped": why}`."""
    try:
        codes = tokenizer(path, 60 * args.max_minutes)
    except BrokenItem as error:
        logger.warning("Skipped: %s", error)
        return {"skipped": str(error)}
    bounds, steps = edges(args, tokenizer), codes.shape[-1] - tokenizer.tail
    buckets = [(min(first, steps), min(end, steps)) for first, end in itertools.pairwise(bounds)]
    record: dict[str, Any] = {"steps": [end - first for first, end in buckets]}
    for name in likelihood.conditions:
        with under(name, likelihood.model):
            nats: torch.Tensor = likelihood([codes])[0]
        record[name] = [nats[first:end].sum().item() for first, end in buckets]
    return record


@dataclass(frozen=True)
class LongScores:
    """Records by file, as `_score` makes them, and the steps between which their buckets lie, so many a second."""

    files: list[str]
    records: dict[str, dict[str, Any]]
    edges: list[int]
    frame_rate: float

    def beside(self, other: "LongScores") -> "LongScores":
        """With the conditions of `other`, of the same files, behind one's own."""
        return LongScores(self.files, merge(self.records, other.records), self.edges, self.frame_rate)

    def summary(self, args: EvalArgs, reach: Reach) -> dict[str, Any]:
        """Nats per step of each bucket, and of all up to its end; ready for JSON.

        A bucket has the files that reach into it, and the later it is the fewer: its conditions are compared with each
        other on the same files, buckets with each other are not.
        """
        used = [self.records[file] for file in self.files if "steps" in self.records[file]]
        names = [name for name in used[0] if name != "steps"]
        steps = np.array([record["steps"] for record in used], dtype=float)
        nats = {name: np.array([record[name] for record in used]) for name in names}
        nats |= {difference_name(names[0], other): nats[names[0]] - nats[other] for other in names[1:]}
        bootstrap = {"seed": args.seed, "samples": args.bootstrap_samples}
        buckets, up_to = [], []
        for index, (first, end) in enumerate(itertools.pairwise(self.edges)):
            inside = steps[:, index] > 0
            place = {"from_seconds": first / self.frame_rate, "to_seconds": end / self.frame_rate}
            place["files"] = int(inside.sum())
            if inside.any():
                values = {
                    name: mean_interval(sums[inside, index], steps[inside, index], **bootstrap)
                    for name, sums in nats.items()
                }
                buckets.append(place | {"learns": reach.learns(end)} | values)
            whole = steps[:, : index + 1].sum(1) == end
            if whole.any():
                totals = {name: sums[whole, : index + 1].sum(1) for name, sums in nats.items()}
                values = {name: mean_interval(sums / end, **bootstrap) for name, sums in totals.items()}
                up_to.append({"seconds": end / self.frame_rate, "files": int(whole.sum())} | values)
        meaning = args.paper.statement(args.first_codebook_weight_multiplier)
        return {
            "meaning": meaning | {"length_normalisation": "nats per step of a bucket"},
            "files": len(used),
            "skipped": [record["skipped"] for record in self.records.values() if "skipped" in record],
            "context_seconds": reach.context / self.frame_rate,
            "buckets": buckets,
            "up_to": up_to,
            "per_file": {file: self.records[file] for file in self.files},
        }
