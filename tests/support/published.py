"""What the tests of the benchmarks share: a tiny model and a Mimi, settings, and one evaluation by one process."""

import json
from pathlib import Path

import torch
from moshi.models import LMModel, MimiModel, loaders

from example.tiny_repo import LM
from finetune.common.distributed import Context
from finetune.evaluation.conditions import BASELINE
from finetune.evaluation.published.evaluate import score_benchmarks
from finetune.evaluation.result_store import ResultStore
from finetune.settings.evaluation import EvalArgs, PaperArgs
from tests.support.models import randomise_targets
from tests.support.tiny_repository import build_repo

TINY = LM | {"text_card": 96, "dim": 32, "num_layers": 2, "num_heads": 2, "context": 24}
CHUNK = 8
TTT = {"ttt_enabled": True, "ttt_layers": [1], "ttt_chunk_size": CHUNK, "ttt_learning_rate": 0.05}
ALONE = Context(0, 1, 0, torch.device("cpu"))


def make_mimi(folder: Path) -> MimiModel:
    """The Mimi of a tiny repository that is made in `folder`."""
    return load_mimi(build_repo(folder))


def load_mimi(repo: Path) -> MimiModel:
    """The Mimi of a repository that `build_repo` made."""
    config = json.loads((repo / "mimi_config.json").read_text())
    return loaders.get_mimi(repo / "mimi.safetensors", config, num_codebooks=8)


def model_of(seed: int, **changes) -> LMModel:
    """A model that hears four codebooks of each side, with TTT that does something. The patch must be installed."""
    torch.manual_seed(seed)
    return randomise_targets(LMModel(**TINY | TTT | changes).eval())


def settings(max_minutes: float = 30.0, **paper) -> EvalArgs:
    return EvalArgs(paper=PaperArgs(**paper), max_minutes=max_minutes, bootstrap_samples=200)


def evaluate(
    model: LMModel,
    mimi: MimiModel,
    folder: Path,
    args: EvalArgs,
    ctx: Context = ALONE,
    baseline: LMModel | None = None,
    beside_as: str = BASELINE,
) -> dict:
    """The results, kept in `folder` on the way."""
    store = ResultStore(folder, "0", ctx.rank)
    scores = score_benchmarks(model, mimi, args, ctx, store)
    if baseline is not None:
        scores = scores.beside(score_benchmarks(baseline, mimi, args, ctx, store, (beside_as,)))
    return scores.results(args)
