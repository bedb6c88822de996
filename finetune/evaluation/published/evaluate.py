"""All published benchmarks that an evaluation names, of one model, or of two side by side."""

from dataclasses import dataclass
from typing import Any

from moshi.models.lm import LMModel

from ...common.distributed import Context
from ...settings.evaluation import EvalArgs
from ..result_store import ResultStore
from .audio import MonoTokenizer
from .likelihood import Likelihood, Reach
from .longform import LongScores, score_longform
from .pairs import PairScores, score_pairs
from .sets import FOLDERS_OF_PAIRS, load_files, load_pairs


@dataclass(frozen=True)
class BenchmarkScores:
    """The scores of each set by its name, and the reach of the model that they are of."""

    by_set: dict[str, PairScores | LongScores]
    reach: Reach

    def beside(self, other: "BenchmarkScores") -> "BenchmarkScores":
        """With the conditions of `other`, of the same sets, behind one's own."""
        return BenchmarkScores(
            {name: scores.beside(other.by_set[name]) for name, scores in self.by_set.items()}, self.reach
        )

    def results(self, args: EvalArgs) -> dict[str, dict[str, Any]]:
        """As :meth:`PairScores.summary` and :meth:`LongScores.summary` make them; ready for JSON."""
        return {name: scores.summary(args, self.reach) for name, scores in self.by_set.items()}


def score_benchmarks(
    model: LMModel,
    mimi: Any,
    args: EvalArgs,
    ctx: Context,
    store: ResultStore,
    conditions: tuple[str, ...] | None = None,
) -> BenchmarkScores:
    """Scores each set in `args.paper`; all ranks call it and all get the same.

    Items are shared out over the ranks, and each is kept in `store` as soon as it is scored.

    Args:
        model: in eval mode, not streaming.
        mimi: Mimi on any device.
        conditions: what the model is scored as; by default with updates on and off, or as it is without TTT.

    Raises:
        ConfigError: for a set that cannot be read, before anything is scored.
        BrokenData: when more than 5 % of a set cannot be used.
    """
    paths = {name: getattr(args.paper, name) for name in args.paper.sets()}
    pairs = {name: load_pairs(name, path, args.paper.split) for name, path in paths.items() if name in FOLDERS_OF_PAIRS}
    files = {name: load_files(path) for name, path in paths.items() if name not in FOLDERS_OF_PAIRS}
    likelihood, tokenizer = Likelihood(model, args, conditions), MonoTokenizer.for_model(model, mimi)
    scores: dict[str, PairScores | LongScores] = {}
    for name in paths:
        if name in pairs:
            scores[name] = score_pairs(name, pairs[name], args, likelihood, tokenizer, ctx, store=store)
        else:
            scores[name] = score_longform(files[name], args, likelihood, tokenizer, ctx, store=store)
    return BenchmarkScores(scores, likelihood.reach)
