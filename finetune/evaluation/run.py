"""An evaluation from its settings to its results, in one process or, under `torchrun`, in many."""

import copy
import dataclasses
import gc
import logging
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel
from moshi.models.loaders import CheckpointInfo
from tqdm.contrib.logging import logging_redirect_tqdm

import moshi_patch

from ..checkpoint.saved import SavedCheckpoint, load_model
from ..checkpoint.verify import refuse_broken
from ..common.disk import reading
from ..common.distributed import Context, cleanup, on_all_ranks, on_rank_0, setup
from ..common.versions import versions
from ..data.tokenize import load_speech_tokenizer
from ..settings.schema import ttt_keyword
from ..settings.validation import check_moshi_paths
from .baseline import OWN_CONTROL, Baseline, load_baseline, open_baseline, telling_how_to_leave_it_out
from .conditions import conditions_of, muting_conditions
from .loss_tables import settings_table
from .output import heading, make_out_dir, out_dir, write_results
from .published.evaluate import score_benchmarks
from .result_store import ResultStore, file_identity, fingerprint, tree_identity
from .scoring import score_streams
from .settings_in_force import CHANGEABLE, COMMAND_LINE, Settings
from .streams import Streams
from .summary import summarise

logger = logging.getLogger(__name__)


def evaluate(settings: Settings) -> str:
    """Evaluates a checkpoint; what was done before with the same settings, weights and data is not done again.

    Returns:
        On rank 0 the page for the terminal, with where the files are; nothing on the others.

    Raises:
        ConfigError: for weights and settings that contradict each other, before a model is loaded; or for a loss that
            is not finite.
        BrokenData: for data that cannot be read.
        DiskError: when the disk is full.
    """
    args = settings.args
    check_moshi_paths(args.moshi_paths, weights=settings.checkpoint.needs_base)
    baseline = open_baseline(args, settings.checkpoint)
    ctx = setup()
    try:
        on_rank_0(ctx, lambda: refuse_broken(settings.checkpoint, "checkpoint_dir"))
        if baseline is not None and baseline.checkpoint is not None:
            with telling_how_to_leave_it_out(args):
                on_rank_0(ctx, lambda: refuse_broken(baseline.checkpoint, "baseline"))
        if ctx.rank == 0:
            logger.info("Settings that are not the defaults:\n%s", settings_table(settings))
            for message in (*settings.warnings, *(baseline.notes if baseline is not None else ())):
                logger.warning("%s", message)
        with moshi_patch.without_compiling(ctx.device), logging_redirect_tqdm():
            return Evaluation(settings, baseline, ctx).run()
    finally:
        cleanup()


class Evaluation:
    """What an evaluation holds while it runs.

    Args:
        settings: validated.
        baseline: to compare with, or None.
    """

    def __init__(self, settings: Settings, baseline: Baseline | None, ctx: Context):
        self.settings, self.args, self.ctx = settings, settings.args, ctx
        self.baseline, self.out = baseline, out_dir(settings)
        self.dtype = getattr(torch, self.args.param_dtype)
        self.checkpoint = with_overrides(settings)
        on_rank_0(ctx, lambda: make_out_dir(self.out))

    def run(self) -> str:
        """Scores under all conditions, writes what was found, and returns the page, on rank 0.

        One model is held at a time: first the checkpoint's, then the baseline's.
        """
        args, ctx, content = self.args, self.ctx, heading(self.settings, self.ctx)
        model, info = on_all_ranks(ctx, self._load)
        logger.info("%s", moshi_patch.fit_threads(model) or f"On {ctx.device}.")
        tokenizer = load_speech_tokenizer(model, info, 60 * args.max_minutes, ctx.device)
        mimi, context = tokenizer.mimi, model.context
        if args.standard:
            streams = Streams.find(args, tokenizer, ctx)
            store = self._store(info, {"streams": streams.identity()})
            conditions = conditions_of(model) + (muting_conditions(model) if args.by_layer else ())
            kinds = {condition: f"standard/{condition}" for condition in conditions}
            self._score(model, streams, kinds, store)
        if args.paper_style:
            paper_store = self._store(info, self._identity_of_benchmarks())
            benchmarks = score_benchmarks(model, mimi, args, ctx, paper_store)
        del model
        release()
        if self.baseline is not None:
            condition, model = self.baseline.condition, on_all_ranks(ctx, self._load_baseline)
            if args.standard:
                beside = {condition: f"standard/{condition} {fingerprint(baseline=self.baseline.identity())}"}
                self._score(model, streams, beside, store)
                kinds |= beside
            if args.paper_style:
                other = score_benchmarks(model, mimi, args, ctx, paper_store, (condition,))
                benchmarks = benchmarks.beside(other)
        if args.standard:
            store.refresh()
            content["standard"] = on_rank_0(ctx, lambda: summarise(streams, kinds, store, args, context))
            content["standard"]["notes"] = [] if self.baseline is None else self.baseline.notes
        if args.paper_style:
            content["paper"] = benchmarks.results(args)
        page = on_rank_0(ctx, lambda: write_results(self.out, content, self.settings.checkpoint))
        return page if ctx.rank == 0 else ""

    def _load(self) -> tuple[LMModel, CheckpointInfo]:
        base = " over its base model in moshi_paths" if self.checkpoint.needs_base else ""
        with reading(f"checkpoint_dir={self.args.checkpoint_dir!r}: cannot be loaded{base}"):
            return load_model(self.checkpoint, self.args.moshi_paths, self.ctx.device, self.dtype)

    def _load_baseline(self) -> LMModel:
        name = self.args.baseline or OWN_CONTROL
        with telling_how_to_leave_it_out(self.args), reading(f"baseline={name!r}: cannot be loaded"):
            return load_baseline(self.baseline, self.ctx.device, self.dtype)

    def _score(self, model: LMModel, streams: Streams, kinds: dict[str, str], store: ResultStore) -> None:
        """`score_streams` on all ranks: when it returns, what the others found is on the disk."""
        on_all_ranks(self.ctx, lambda: score_streams(model, streams, kinds, self.args, self.ctx, store))

    def _identity_of_benchmarks(self) -> dict[str, Any]:
        args = self.args
        return {
            "paper": dataclasses.asdict(args.paper),
            "sets": [tree_identity(Path(getattr(args.paper, name))) for name in args.paper.sets()],
            "seed": args.seed,
            "baseline": None if self.baseline is None else self.baseline.identity(),
        }

    def _store(self, info: CheckpointInfo, data: dict[str, Any]) -> ResultStore:
        """What was found before with everything as it is now, `data` too. Collective."""
        args = self.args
        content = {
            "weights": file_identity(self.checkpoint.weights),
            "base": file_identity(info.moshi_weights) if self.checkpoint.needs_base else None,
            "files": [file_identity(info.mimi_weights), file_identity(info.tokenizer)],
            "config": self.checkpoint.config,
            "precision": args.param_dtype,
            "weighting": [args.text_padding_weight, args.first_codebook_weight_multiplier],
            "max_minutes": args.max_minutes,
            "versions": versions(),
            "device": self.ctx.device.type,
        }
        name = fingerprint(**content, **data)
        # Nobody adds to it before all have read it: they share out the same rest.
        return on_all_ranks(self.ctx, lambda: ResultStore(self.out / "items", name, self.ctx.rank))


def with_overrides(settings: Settings) -> SavedCheckpoint:
    """The checkpoint with those settings of TTT that the command line replaces."""
    config = copy.deepcopy(settings.checkpoint.config)
    for key in CHANGEABLE:
        if settings.sources[key] == COMMAND_LINE:
            config[ttt_keyword(key)] = getattr(settings.args.ttt, key.removeprefix("ttt."))
    return dataclasses.replace(settings.checkpoint, config=config)


def release() -> None:
    """Gives the memory of models that nobody holds any more back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
