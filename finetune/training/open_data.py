"""The data of a run: looked at before the model is loaded, opened after it, and the same on all ranks."""

import logging
import shlex
from collections.abc import Callable
from typing import TypeVar

from ..common.distributed import Context, gather_over_ranks, on_all_ranks, on_rank_0
from ..data.broken import BrokenData
from ..data.loader import EvalLoader, TrainLoader
from ..data.sample import look_at_sample
from ..data.segments import Cutter, Listing, first_difference
from ..data.text_tokenizer import load_text_tokenizer, padding_ids
from ..data.tokenize import load_speech_tokenizer
from ..model.base import find_base_files
from ..settings.schema import STEPS_PER_SECOND, TrainArgs
from .build_model import BuiltModel

logger = logging.getLogger(__name__)

T = TypeVar("T")


def check_data(args: TrainArgs, ctx: Context) -> None:
    """Refuses data that `open_data` would, and data of which nothing is learnt, before a model is loaded. Collective.

    Raises:
        ConfigError: when the text tokenizer is damaged, or does not fit the model.
        BrokenData: as `open_data`; or when hardly a word of a source becomes text, as a sample of it shows.
    """
    cutter = Cutter(args.duration_sec, STEPS_PER_SECOND)
    specs = [args.data.train_data] + [args.data.eval_data] * args.do_eval
    listings = _find(ctx, lambda: [Listing(spec, cutter, quiet=True) for spec in specs])
    _refuse_other_files(listings)
    on_rank_0(ctx, lambda: _look_at_samples(args, listings, cutter))


def _look_at_samples(args: TrainArgs, listings: list[Listing], cutter: Cutter) -> None:
    info = find_base_files(args.moshi_paths, weights=False)
    tokenizer = load_text_tokenizer(info.tokenizer, info.lm_config)
    for listing in listings:
        sampled = look_at_sample(listing, cutter, tokenizer, padding_ids(info.lm_config or {}))
        for warning in sampled.warnings:
            logger.warning("%s", warning)
        if sampled.refusals:
            command = f"{listing.command} --tokenizer {shlex.quote(str(info.tokenizer))}"
            raise BrokenData(f"{sampled.refusals[0]}. `{command}` says more.")


def open_data(args: TrainArgs, ctx: Context, built: BuiltModel) -> tuple[TrainLoader, EvalLoader | None]:
    """The batches of `args.data` for the model, and those of evaluation if there is one. Collective.

    Raises:
        ConfigError: when Mimi or the text tokenizer is damaged, or does not fit the model.
        BrokenData: when too much is missing, or not all ranks see the same files; on all ranks.
    """

    def load() -> tuple[TrainLoader, EvalLoader | None]:
        tokenizer = load_speech_tokenizer(built.model, built.info, args.duration_sec, ctx.device)
        ranks = {"rank": ctx.rank, "world_size": ctx.world_size, "gather": gather_over_ranks}
        loader = TrainLoader(args, tokenizer, **ranks)
        return loader, EvalLoader(args, tokenizer, **ranks) if args.do_eval else None

    loaders = _find(ctx, load)
    _refuse_other_files([loader.listing for loader in loaders if loader is not None])
    return loaders


def _find(ctx: Context, action: Callable[[], T]) -> T:
    """As `on_all_ranks`; what is broken says on which rank: the disks of several machines may differ."""

    def named() -> T:
        try:
            return action()
        except BrokenData as error:
            raise BrokenData(f"rank {ctx.rank}: {error}") from error

    return on_all_ranks(ctx, action if ctx.world_size == 1 else named)


def _refuse_other_files(mine: list[Listing]) -> None:
    """That all ranks see the same files. Collective."""
    digests = gather_over_ranks([[listing.digests for listing in mine]])
    for each in zip(*digests, strict=True):
        difference = first_difference(list(each))
        if difference is not None:
            raise BrokenData(
                f"{difference}; all processes must see the same files. Copy them to every machine, or put them on a "
                "disk that all of them see."
            )
