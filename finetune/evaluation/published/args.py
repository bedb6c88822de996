"""Settings of the published benchmarks: the section `paper:` of an evaluation."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import ConfigError

CODEBOOKS = {
    "first": "the first codebook alone, Mimi's semantic one",
    "all": "all of Moshi's codebooks, summed, the first weighted as in training",
}
NORMALISE = {
    "mean": "nats per step, the sum over a recording's steps divided by their number",
    "sum": "nats of the whole recording, not divided by its length",
}
SPLITS = ("dev", "test")


@dataclass
class PaperArgs:
    """Which data sets to evaluate on, and what a likelihood is. A set whose path is null is left out.

    Of each long-form file the first `max_minutes` of the evaluation are heard.

    Args:
        swuggy, sblimp, sstorycloze, tstorycloze: a folder in the set's published layout, or a `.jsonl` list of pairs.
        longform: a folder of audio files such as Libri-Light's, or a `.jsonl` list of them.
        split: of sWUGGY and sBLIMP when the folder is that of the whole ZeroSpeech 2021 data set.
        codebooks: `first` or `all`. The benchmarks are about words and their order, which the first codebook was
            distilled to carry; the seven others tell how it sounds, and would outvote it. Among `all` the first has
            the evaluation's `first_codebook_weight_multiplier`, the others 1.
        normalise: `mean` or `sum`. Without division the shorter of two recordings mostly wins.
        max_items: at most so many pairs or files of each set, drawn by the evaluation's seed; null takes all.
        batch_steps: steps of a batch of pairs, padding included.
    """

    swuggy: str | None = None
    sblimp: str | None = None
    sstorycloze: str | None = None
    tstorycloze: str | None = None
    longform: str | None = None
    split: str = "dev"
    codebooks: str = "first"
    normalise: str = "mean"
    max_items: int | None = None
    batch_steps: int = 4096

    def validate(self, section: str = "paper") -> None:
        """What can be known before a model is loaded; looks whether paths exist but opens none.

        Raises:
            ConfigError: naming the key, its value and what is allowed.
        """

        def require(holds: bool, name: str, allowed: str) -> None:
            if not holds:
                raise ConfigError(f"{section}.{name}={getattr(self, name)!r}: {allowed}")

        for name in self.sets():
            path = Path(getattr(self, name))
            require(path.exists(), name, "no such file or folder; correct the path, or null to leave the set out.")
            listed = path.is_dir() or path.suffix == ".jsonl"
            require(listed, name, "must be a folder or a .jsonl list.")
        require(bool(self.sets()), "swuggy", f"no data set is given; set one of {', '.join(DATA_SETS)}.")
        for name, allowed in (("split", SPLITS), ("codebooks", CODEBOOKS), ("normalise", NORMALISE)):
            require(getattr(self, name) in allowed, name, f"must be one of {', '.join(allowed)}.")
        require(self.max_items is None or self.max_items > 0, "max_items", "must be a positive number, or null.")
        require(self.batch_steps > 0, "batch_steps", "must be a positive number.")

    def sets(self) -> list[str]:
        """The data sets that a path is given for."""
        return [name for name in DATA_SETS if getattr(self, name) is not None]

    def statement(self, first_codebook_weight_multiplier: float) -> dict[str, str]:
        """What every number means, in words; stands in the results beside them."""
        counted = CODEBOOKS[self.codebooks]
        if self.codebooks == "all":
            counted += f": by {first_codebook_weight_multiplier:g}"
        return {
            "codebooks": counted,
            "length_normalisation": NORMALISE[self.normalise],
            "channel": "Moshi's own; silence on the user's, padding as text, whose loss is left out",
            "ties": "count as half",
        }


DATA_SETS = tuple(item.name for item in dataclasses.fields(PaperArgs))[:5]
