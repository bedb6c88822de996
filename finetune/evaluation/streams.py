"""The streams of a standard evaluation: every recording once, each heard from its beginning."""

import logging
import math
from dataclasses import dataclass
from typing import Any

from ..common.distributed import Context
from ..data.audio import durations
from ..data.manifest import transcript_path
from ..data.reader import ItemReader
from ..data.sample import look_at_sample
from ..data.segments import Listing, Segment
from ..data.tokenize import SpeechTokenizer
from ..settings.evaluation import EvalArgs
from .result_store import file_identity

logger = logging.getLogger(__name__)

CURVE_POINTS, MIN_CURVE_STEPS = 40, 10
"""The plot: so many points for the longest stream, none of fewer steps."""


@dataclass(frozen=True)
class Streams:
    """What is evaluated.

    Attributes:
        segments: the streams, each once.
        seconds: how long each is.
        curve_steps: how many steps a point of the plot has.
        reader: reads them.
    """

    segments: list[Segment]
    seconds: list[float]
    curve_steps: int
    reader: ItemReader

    @classmethod
    def find(cls, args: EvalArgs, tokenizer: SpeechTokenizer, ctx: Context) -> "Streams":
        """All recordings of `data.eval_data`, each once, cut where they are longer than `max_minutes`.

        Raises:
            BrokenData: when more than 5 % of them are missing, or all.
        """
        listing = Listing(args.data.eval_data, tokenizer, quiet=ctx.rank > 0)
        if ctx.rank == 0:
            sampled = look_at_sample(listing, tokenizer, tokenizer.text_tokenizer, tokenizer.padding_ids)
            for text in sampled.refusals + sampled.warnings:
                logger.warning("%s", text)
        segments = list(dict.fromkeys(segment for source in listing.segments for segment in source))
        longest = tokenizer.steps / tokenizer.mimi.frame_rate
        whole = durations(segment.path for segment in segments)
        seconds = [
            min(max((duration or 0.0) - segment.first_step / tokenizer.mimi.frame_rate, 0.0), longest)
            for segment, duration in zip(segments, whole, strict=True)
        ]
        points = math.ceil(max(seconds) * tokenizer.mimi.frame_rate / CURVE_POINTS)
        return cls(segments, seconds, max(points, MIN_CURVE_STEPS), ItemReader(listing, tokenizer))

    def identity(self) -> list[Any]:
        """What the results depend on, for a fingerprint."""
        paths = dict.fromkeys(segment.path for segment in self.segments)
        return [self.curve_steps, *([file_identity(path), file_identity(transcript_path(path))] for path in paths)]


def item_id(segment: Segment) -> str:
    """Unique in an evaluation, and the same in another run."""
    return f"{segment.path}#{segment.first_step}"
