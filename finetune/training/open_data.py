"""The data of a run: looked at before the model is loaded, opened after it, and the same on all ranks."""

from collections.abc import Callable
from typing import TypeVar

from ..common.distributed import Context, gather_over_ranks, on_all_ranks
from ..data.broken import BrokenData
from ..data.loader import EvalLoader, TrainLoader
from ..data.segments import Cutter, Listing, first_difference
from ..data.tokenize import load_speech_tokenizer
from ..settings.schema import STEPS_PER_SECOND, TrainArgs
from .build_model import BuiltModel

T = TypeVar("T")


def check_data(args: TrainArgs, ctx: Context) -> None:
    """What `open_data` would refuse, as far as it shows without a model. Collective.

    Raises:
        BrokenData: as `open_data`.
    """
    cutter = Cutter(args.duration_sec, STEPS_PER_SECOND)
    specs = [args.data.train_data] + [args.data.eval_data] * args.do_eval
    _refuse_other_files(_find(ctx, lambda: [Listing(spec, cutter, quiet=True) for spec in specs]))


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
