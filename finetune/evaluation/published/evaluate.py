"""All published benchmarks that an evaluation names."""

from typing import Any

from moshi.models.lm import LMModel

from ...common.distributed import Context
from ...settings.evaluation import EvalArgs
from ..conditions import BASELINE
from ..result_store import ResultStore
from .audio import MonoTokenizer
from .likelihood import Likelihood
from .longform import score_longform
from .pairs import score_pairs
from .sets import FOLDERS_OF_PAIRS, load_files, load_pairs


def evaluate_paper(
    model: LMModel,
    mimi: Any,
    args: EvalArgs,
    ctx: Context,
    store: ResultStore,
    baseline: LMModel | None = None,
    beside_as: str = BASELINE,
) -> dict[str, dict[str, Any]]:
    """The results of each set in `args.paper`, by its name; all ranks call it and all get the same.

    A model with TTT is scored with updates on and off, any other as it is; `baseline` as it is, beside it.
    Items are shared out over the ranks, and each is kept in `store` as soon as it is scored.

    Args:
        model, baseline: in eval mode, not streaming.
        mimi: Mimi on any device.
        beside_as: under which condition the baseline is reported, `BASELINE` or `CONTROL`.

    Returns:
        As :meth:`PairScores.summary` and :meth:`LongScores.summary` make them; ready for JSON.

    Raises:
        ConfigError: for a set that cannot be read, before anything is scored.
        BrokenData: when more than 5 % of a set cannot be used.
    """
    likelihood = Likelihood(model, args)
    scorers = [(likelihood, MonoTokenizer.for_model(model, mimi))]
    if baseline is not None:
        beside = Likelihood(baseline, args, (beside_as,))
        scorers.append((beside, MonoTokenizer.for_model(baseline, mimi)))
    paths = {name: getattr(args.paper, name) for name in args.paper.sets()}
    found = {name: load_pairs(name, path, args.paper.split) for name, path in paths.items() if name in FOLDERS_OF_PAIRS}
    files = {name: load_files(path) for name, path in paths.items() if name not in FOLDERS_OF_PAIRS}
    results = {}
    for name in paths:
        if name in found:
            scores, *others = [score_pairs(name, found[name], args, *scorer, ctx, store=store) for scorer in scorers]
        else:
            scores, *others = [score_longform(files[name], args, *scorer, ctx, store=store) for scorer in scorers]
        for other in others:
            scores = scores.beside(other)
        results[name] = scores.summary(args, likelihood)
    return results
