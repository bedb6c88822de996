"""The options of the programs that have no file of settings."""

import re
from dataclasses import dataclass, field

from .limits import limited, number, whole

POSITIONAL = {"positional": True}
"""Metadata of a field that is an argument without a name on the command line."""

LAYERS = re.compile(r"\d{1,4}|\d{1,4}(\s*,\s*\d{1,4})+|\[\s*\d{1,4}(\s*,\s*\d{1,4})*\s*\]")
"""A number of layers, or a list of them."""


def _names_layers(value: str | None) -> bool:
    return value is None or LAYERS.fullmatch(value) is not None


@dataclass
class DoctorArgs:
    """Checks this machine and, if given, a checkpoint. Exits with 1 if anything failed, else with 0."""

    checkpoint: str | None = field(default=None, metadata=POSITIONAL)
    """a run (its newest checkpoint), a checkpoint of it, or an export"""
    base: str | None = None
    """the base model of adapters: a Hub repository, a folder like one, or its .safetensors file; null: as trained"""
    device: str = limited("cpu", "cpu, cuda, or cuda:0, cuda:1 and so on", re.compile(r"cpu|cuda(:\d{1,3})?").fullmatch)
    """where the model is loaded"""
    json: bool = False
    """print one JSON object instead of lines"""
    expect_layers: str | None = limited(None, "layers such as 5,11,17, or their number", _names_layers)
    """the layers that are to have TTT, or how many; [5] is layer 5 alone; null: not looked at"""


@dataclass
class ExportArgs:
    """Makes a folder that is served by its path, and uploaded to the Hub as it is."""

    checkpoint: str = field(metadata=POSITIONAL)
    """a run (its newest checkpoint), or a checkpoint of it"""
    out: str = field(metadata=POSITIONAL)
    """the folder to make; must not exist"""
    best: bool = False
    """of a run, the checkpoint with the lowest held-out loss in place of the newest"""
    merge: bool = False
    """merge adapters into the base model"""
    with_base: bool = False
    """copy the base model of adapters into OUT"""
    base: str | None = None
    """the base model: a Hub repository, a folder like one, or its .safetensors file; null: as trained"""
    name: str | None = None
    """title of the model card; null: the name of OUT"""
    eval: str | None = None
    """eval.json with results for the model card; null: that of this checkpoint, if there is one"""


@dataclass
class ImportArgs:
    """Makes a checkpoint of ttt_kind "mlp" from that of an ancestor, an older hybrid of Moshi and TTT-MLP."""

    source: str = field(metadata=POSITIONAL)
    """the ancestor's run (its newest checkpoint), a checkpoint of it, or its file of weights"""
    out: str = ""
    """the folder to make; must not exist"""
    config: str | None = None
    """YAML file of its training, for a checkpoint without training_config.json"""


@dataclass
class CheckArgs:
    """Checks a dataset for all that training would stumble over. Exits with 1 if there was a problem, else with 0."""

    data: list[str] = field(metadata=POSITIONAL)
    """lists (.jsonl), or folders of lists"""
    tokenizer: str | None = None
    """text tokenizer of the model (a SentencePiece file): are the words known to it? null: not looked at"""
    config: str | None = None
    """config.json of the model, for its tokenizer and its text conditions; null: not looked at"""
    duration: float | None = number(None, least=0.08, most=86_400)
    """seconds of a segment (duration_sec of the training): how are files cut? null: not looked at"""
    json: bool = False
    """print all that was found as JSON"""


@dataclass
class SplitArgs:
    """Divides the conversations of a data set into lists to train on and to evaluate with; leaves out broken ones."""

    source: str = field(metadata=POSITIONAL)
    """the list of the data set (.jsonl), or the folder that holds it"""
    out: str = field(metadata=POSITIONAL)
    """the folder to make for train.jsonl and eval.jsonl; must not exist"""
    held_out: float = number(0.05, above=0, below=1)
    """share of the conversations that are held out, for eval.jsonl"""
    seed: int = whole(0, 0, 2**63 - 1)
    """of the choice"""
