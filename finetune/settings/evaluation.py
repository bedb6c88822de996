"""All settings of an evaluation. Keys that training has too mean the same there."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from moshi_patch import TTTConfig

from .limits import check_limits, choice, number, require, whole
from .schema import PARAM_DTYPES, MoshiPaths
from .sources import check_sources

EVAL_TYPES = ("standard", "paper", "both")
CODEBOOKS = {
    "first": "the first codebook alone, Mimi's semantic one",
    "all": "all of Moshi's codebooks, summed, the first weighted as in training",
}
NORMALISE = {
    "mean": "nats per step, the sum over a recording's steps divided by their number",
    "sum": "nats of the whole recording, not divided by its length",
}
SPLITS = ("dev", "test")
SEGMENT_STEPS = 2048
"""Steps of a segment. Longer ones take more memory; shorter ones move TTT's delta, and the keys, more often."""


@dataclass
class EvalData:
    """Lists of audio files, as in training."""

    eval_data: str = ""
    """a .jsonl list, a folder of lists, or several joined by commas; by default those of the training"""


@dataclass
class LoraSettings:
    """The adapters in the checkpoint; read from its config.json, not to be chosen."""

    enable: bool = False
    """the checkpoint holds adapters"""
    rank: int | None = None
    """rank of the adapters"""
    scaling: float | None = None
    """factor of what the adapters add"""


@dataclass
class PaperArgs:
    """Published benchmarks. A set whose path is null is left out; of a long file `max_minutes` are heard."""

    swuggy: str | None = None
    """sWUGGY: a folder in its published layout, or a .jsonl list of pairs"""
    sblimp: str | None = None
    """sBLIMP: a folder in its published layout, or a .jsonl list of pairs"""
    sstorycloze: str | None = None
    """spoken StoryCloze: a folder in its published layout, or a .jsonl list of pairs"""
    tstorycloze: str | None = None
    """topic StoryCloze: a folder in its published layout, or a .jsonl list of pairs"""
    longform: str | None = None
    """a folder of audio files such as Libri-Light's, or a .jsonl list of them"""
    split: str = choice("dev", SPLITS)
    """which half of sWUGGY and sBLIMP, when the folder is that of the whole ZeroSpeech 2021 data set"""
    codebooks: str = choice("first", tuple(CODEBOOKS))
    """what a likelihood is of: the first codebook was distilled to carry words, the others tell how it sounds"""
    normalise: str = choice("mean", tuple(NORMALISE))
    """nats per step, or of the whole recording, with which the shorter of two mostly wins"""
    max_items: int | None = whole(None, 1, 10**9)
    """at most so many pairs or files of each set, drawn by the seed; null: all"""
    batch_steps: int = whole(4096, 1, 10**7)
    """steps of 80 ms in a batch of pairs, padding included"""

    def validate(self, section: str = "paper") -> None:
        """What can be known before a model is loaded; looks whether paths exist but opens none.

        Raises:
            ConfigError: naming the key, its value and what is allowed.
        """
        check_limits(self, f"{section}.")
        for name in self.sets():
            path, key = Path(getattr(self, name)), f"{section}.{name}"
            remedy = "no such file or folder; correct the path, or null to leave the set out."
            require(path.exists(), key, str(path), remedy)
            require(path.is_dir() or path.suffix == ".jsonl", key, str(path), "must be a folder or a .jsonl list.")
        remedy = f"no data set is given; set one of {', '.join(DATA_SETS)}."
        require(bool(self.sets()), f"{section}.swuggy", self.swuggy, remedy)

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
            "differences": "of errors (1 - accuracy) or of nats; negative is better",
        }


DATA_SETS = tuple(item.name for item in dataclasses.fields(PaperArgs))[:5]


@dataclass
class EvalArgs:
    """One evaluation of a checkpoint."""

    checkpoint_dir: str = ""
    """required: a run's folder (its newest checkpoint), a checkpoint's, its `consolidated`, or an export"""
    eval_type: str = choice("standard", EVAL_TYPES)
    """standard: losses on data.eval_data; paper: the benchmarks of `paper.`; or both"""
    baseline: str | None = None
    """compare with: `control`, a checkpoint, a base model's folder, `base`, `none`; null: the run's control, if any"""
    best: bool = False
    """of the run in checkpoint_dir, evaluate the step with the lowest held-out loss in place of the newest"""
    by_layer: bool = False
    """measure also without the updates of one TTT layer at a time; takes one more pass for each"""
    out_dir: str | None = None
    """folder for the results; null: RUN_DIR/eval/checkpoint_..., or `eval` in the checkpoint's folder"""
    data: EvalData = field(default_factory=EvalData)
    paper: PaperArgs = field(default_factory=PaperArgs)
    max_minutes: float = number(30.0, least=0.01, most=1440)
    """minutes; a file is one stream, and a longer one is cut into streams of so many minutes"""
    eval_batch_size: int = whole(1, 1, 4096)
    """streams scored together; more is faster on a GPU and takes more memory"""
    segment_steps: int = whole(SEGMENT_STEPS, 1, 10**6)
    """steps of 80 ms of a stream done at a time; fewer take less memory, and nothing else changes"""
    bootstrap_samples: int = whole(2000, 1, 10**5)
    """resamples that the 95 % intervals are computed from"""
    seed: int = whole(0, 0, 2**63 - 1)
    """of the bootstrap"""
    param_dtype: str = choice("bfloat16", PARAM_DTYPES)
    """precision of the weights while they are evaluated; by default that of the training"""
    text_padding_weight: float = number(0.5, least=0, most=1e6)
    """weight of padding in the text loss; by default that of the training"""
    first_codebook_weight_multiplier: float = number(1.0, above=0, most=1e6)
    """weight of Moshi's first codebook in the audio loss; by default that of the training"""
    moshi_paths: MoshiPaths = field(default_factory=MoshiPaths)
    ttt: TTTConfig = field(default_factory=TTTConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)

    @property
    def standard(self) -> bool:
        return self.eval_type in ("standard", "both")

    @property
    def paper_style(self) -> bool:
        return self.eval_type in ("paper", "both")

    def validate(self) -> None:
        """What can be known before a model is loaded.

        Raises:
            ConfigError: naming the key, its value and what is allowed.
        """
        check_limits(self)
        remedy = "layers are told apart by losses alone; eval_type must be standard or both."
        require(self.standard or not self.by_layer, "by_layer", self.by_layer, remedy)
        if self.standard:
            check_sources("data.eval_data", self.data.eval_data)
        if self.paper_style:
            self.paper.validate()
