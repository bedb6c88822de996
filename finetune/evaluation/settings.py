"""The settings of an evaluation, and where each of them comes from.

In force is, for every key by itself, what the first of these says: the command line, the checkpoint's
`training_config.json`, the YAML file, the default. An empty text in a file says nothing: a training without evaluation
has no `data.eval_data`. An exported folder brings its own `moshi_paths`, in place of the training's. What the weights
were trained to be comes from the checkpoint's `config.json` alone.
"""

import dataclasses
import math
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.saved import SavedCheckpoint, model_paths, open_checkpoint
from ..common.errors import ConfigError
from ..model.stream import SEGMENT_STEPS
from ..settings.parsing import build, flat, override, read_options, read_yaml
from ..settings.schema import PARAM_DTYPES, MoshiPaths, TrainArgs, TTTSettings
from ..settings.sources import parse_sources
from .published.args import PaperArgs

EVAL_TYPES = ("standard", "paper", "both")
COMMAND_LINE, TRAINING, CONFIG, DEFAULT = "command line", "training_config.json", "config.json", "default"
OWN = "the checkpoint's own folder"
FREE = ("ttt.chunk_size", "ttt.learning_rate", "ttt.delta_clip", "ttt.decay")
"""Settings of TTT that fit any weights: the command line may replace what they were trained with."""


@dataclass
class EvalData:
    """Lists of files as in training: a `.jsonl`, a folder of them, or several joined by commas."""

    eval_data: str = ""


@dataclass
class LoraSettings:
    """The adapters in the checkpoint; not to be chosen."""

    enable: bool = False
    rank: int | None = None
    scaling: float | None = None


@dataclass
class EvalArgs:
    """One evaluation. Keys that training has too mean the same there.

    Args:
        checkpoint_dir: a run's folder (its newest checkpoint), a checkpoint's or its `consolidated`.
        eval_type: `standard`, `paper` or `both`.
        baseline: a checkpoint or the folder of a base model to compare with; `base`: the one in `moshi_paths`.
        out_dir: null: `RUN_DIR/eval/checkpoint_...`.
        max_minutes: a file is one stream; longer ones are cut into streams of so many minutes.
        eval_batch_size: streams scored together.
        segment_steps: of a stream, done at a time; bounds the memory and changes nothing else.
        bootstrap_samples: from which the intervals are computed.
        seed: of the bootstrap.
        param_dtype: precision of the weights while they are evaluated.
    """

    checkpoint_dir: str = ""
    eval_type: str = "standard"
    baseline: str | None = None
    out_dir: str | None = None
    data: EvalData = field(default_factory=EvalData)
    paper: PaperArgs = field(default_factory=PaperArgs)
    max_minutes: float = 30.0
    eval_batch_size: int = 1
    segment_steps: int = SEGMENT_STEPS
    bootstrap_samples: int = 2000
    seed: int = 0
    param_dtype: str = "bfloat16"
    text_padding_weight: float = 0.5
    first_codebook_weight_multiplier: float = 1.0
    moshi_paths: MoshiPaths = field(default_factory=MoshiPaths)
    ttt: TTTSettings = field(default_factory=TTTSettings)
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
        self.ttt.lm_kwargs()
        _require(self.eval_type in EVAL_TYPES, "eval_type", self.eval_type, f"must be one of {', '.join(EVAL_TYPES)}.")
        for name in ("max_minutes", "first_codebook_weight_multiplier"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value > 0, name, value, "must be a positive finite number.")
        for name in ("eval_batch_size", "segment_steps", "bootstrap_samples"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "must be a positive whole number.")
        weight = self.text_padding_weight
        allowed = math.isfinite(weight) and weight >= 0
        _require(allowed, "text_padding_weight", weight, "must be a finite number that is not negative.")
        _require(self.seed >= 0, "seed", self.seed, "must be a whole number that is not negative.")
        dtypes = ", ".join(PARAM_DTYPES)
        _require(self.param_dtype in PARAM_DTYPES, "param_dtype", self.param_dtype, f"must be one of {dtypes}.")
        if self.standard:
            self._check_data()
        if self.paper_style:
            self.paper.validate()

    def _check_data(self) -> None:
        spec = self.data.eval_data
        remedy = "is required; a .jsonl file or a folder of them, as --data.eval_data FILE.jsonl."
        _require(bool(spec.strip(" ,")), "data.eval_data", spec, remedy)
        try:
            parse_sources(spec)
        except ValueError as error:
            raise ConfigError(f"data.eval_data={spec!r}: {error}") from error


@dataclass(frozen=True)
class Settings:
    """`args` in force, the source of each dotted key, and what to warn of."""

    args: EvalArgs
    sources: dict[str, str]
    checkpoint: SavedCheckpoint
    warnings: list[str]

    def table(self) -> dict[str, dict[str, Any]]:
        """Value and source by dotted key, for `eval.json`."""
        values = flat(dataclasses.asdict(self.args))
        return {key: {"value": values[key], "source": source} for key, source in self.sources.items()}


def parse_command_line(argv: list[str]) -> Settings:
    """`--checkpoint_dir PATH [--config FILE] [--key value]...` with dotted keys, `--key=value` too.

    Raises:
        ConfigError: for an unknown key, a wrong value, a missing checkpoint, or what its weights contradict.
    """
    given: dict[str, Any] = {}
    config = None
    for name, value in read_options(argv, "settings look like `--checkpoint_dir PATH`"):
        if name == "config":
            if not value:
                raise ConfigError("config: needs a value, as in `--config FILE.yaml`.")
            config = Path(value)
        else:
            override(EvalArgs, given, name, value)
    if not given.get("checkpoint_dir"):
        raise ConfigError("checkpoint_dir: is required, as in `--checkpoint_dir RUN/checkpoints/checkpoint_000500`.")
    return load_settings(given, config)


def load_settings(given: dict[str, Any], config: Path | None = None) -> Settings:
    """The settings in force: `given` by the command line, nested, then the checkpoint's, then those of a YAML file.

    Raises:
        ConfigError: as `parse_command_line`.
    """
    yaml = {} if config is None else _read_config(config)
    saved = open_checkpoint(given["checkpoint_dir"])
    trained, own = _trained(saved), _own_files(saved)
    if trained is None and not own and config is None and "moshi_paths" not in given:
        raise ConfigError(
            f"checkpoint_dir={given['checkpoint_dir']!r}: has no training_config.json; give the YAML file of its "
            "training as --config FILE, or its base model as --moshi_paths.hf_repo_id FOLDER."
        )
    command, fixed = flat(given), _architecture(saved)
    layers = [(COMMAND_LINE, command), (OWN, own), (TRAINING, trained or {}), (f"{config}", yaml)]
    values, sources = {}, {}
    for key, default in flat(dataclasses.asdict(EvalArgs())).items():
        values[key], sources[key] = default, DEFAULT
        if key.startswith(("ttt.", "lora.")):
            if key in fixed:
                values[key], sources[key] = fixed[key], CONFIG
            if key in command and key in FREE:
                values[key], sources[key] = command[key], COMMAND_LINE
            continue
        for source, layer in layers:
            if key in layer and (source == COMMAND_LINE or layer[key] != ""):
                values[key], sources[key] = layer[key], source
                break
    args = build(EvalArgs, _nested(values))
    warnings = _compare_with_training(command, fixed)
    args.validate()
    return Settings(args, sources, saved, warnings)


def _read_config(path: Path) -> dict[str, Any]:
    """The settings of a training's YAML file by dotted key; it may also hold those that only an evaluation has."""
    content = read_yaml(path)
    own = typing.get_type_hints(EvalArgs).keys() - typing.get_type_hints(TrainArgs).keys()
    build(EvalArgs, {key: value for key, value in content.items() if key in own})
    training = {key: value for key, value in content.items() if key not in own}
    build(TrainArgs, training)
    return flat({key: value for key, value in content.items() if value is not None})


def _own_files(saved: SavedCheckpoint) -> dict[str, Any]:
    """Where an exported folder holds Mimi and the tokenizer, by dotted key; nothing for a checkpoint without them."""
    try:
        paths = model_paths(saved)
    except ConfigError:
        return {}
    own = paths.config_path == str(saved.folder / CONFIG)
    return flat({"moshi_paths": dataclasses.asdict(paths)}) if own else {}


def _trained(saved: SavedCheckpoint) -> dict[str, Any] | None:
    """The settings of the training by dotted key."""
    if saved.training is None:
        return None
    content = saved.training.get("training")
    if not isinstance(content, dict):
        raise ConfigError(f"{saved.folder / TRAINING}: has no section 'training'; it is not one that train.py wrote.")
    return flat(content)


def _architecture(saved: SavedCheckpoint) -> dict[str, Any]:
    """`ttt.` and `lora.` settings that the checkpoint's config.json holds, by dotted key."""
    config = saved.config
    names = {"lora": "lora.enable", "lora_rank": "lora.rank", "lora_scaling": "lora.scaling"}
    names |= {key: re.sub("^ttt_", "ttt.", key) for key in config if key.startswith("ttt_")}
    return {name: config[key] for key, name in names.items() if key in config}


def _compare_with_training(command: dict[str, Any], fixed: dict[str, Any]) -> list[str]:
    """Warnings of settings of TTT other than the trained ones.

    Raises:
        ConfigError: when the command line asks for what the weights are not.
    """
    warnings = []
    defaults = flat(dataclasses.asdict(EvalArgs()))
    for key in [key for key in command if key.startswith(("ttt.", "lora."))]:
        trained = fixed.get(key, defaults[key])
        if command[key] == trained:
            continue
        if key not in FREE:
            raise ConfigError(
                f"{key}={command[key]!r}: the weights were trained with {trained!r} (config.json); an evaluation "
                f"may change {', '.join(FREE)} alone."
            )
        warnings.append(f"{key}={command[key]!r}: the weights were trained with {trained!r}.")
    return warnings


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        section = content
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return content


def _require(holds: bool, name: str, value: Any, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{name}={value!r}: {remedy}")
