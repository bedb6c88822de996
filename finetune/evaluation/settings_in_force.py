"""The settings of an evaluation, and where each of them comes from.

In force is, for every key by itself, what the first of these says: the command line, the checkpoint's
`training_config.json`, the YAML file, the default. An empty text in a file says nothing: a training without evaluation
has no `data.eval_data`. An exported folder brings its own `moshi_paths`, in place of the training's. What the weights
were trained to be comes from the checkpoint's `config.json` alone.
"""

import dataclasses
import logging
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moshi_patch import TTTConfig

from ..checkpoint.best import best_checkpoint
from ..checkpoint.saved import SavedCheckpoint, model_paths, open_checkpoint
from ..checkpoint.ttt_settings import has_ttt_settings, ttt_from
from ..common.errors import ConfigError
from ..settings.command_line import COMMAND_LINE, DEFAULT, evaluation_options
from ..settings.evaluation import EvalArgs
from ..settings.parsing import build, flat, merge, read_yaml
from ..settings.plan_words import in_our_words, with_kind_settled
from ..settings.schema import TrainArgs, ttt_setting

FOLDER = "the checkpoint's own folder"
TRAINING_FILE, CONFIG_FILE = "training_config.json", "config.json"
"""Where a setting may come from; or from the YAML file, whose name then stands there."""

CHANGEABLE = tuple(
    f"ttt.{name}"
    for name in (
        *("chunk_size", "learning_rate", "delta_clip", "decay", "update", "target_gain"),
        *("base_lr", "mini_batch_size"),
    )
)
"""Settings of TTT that fit any weights of their kind: the command line may replace what they were trained with."""

logger = logging.getLogger(__name__)


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
    return load_settings(*evaluation_options(argv))


def load_settings(command: dict[str, Any], config: Path | None = None) -> Settings:
    """The settings in force: those of the command line by dotted key, then the checkpoint's, then a YAML file's.

    Raises:
        ConfigError: as `parse_command_line`.
    """
    yaml = {} if config is None else _read_config(config)
    given = Path(command["checkpoint_dir"])
    saved = open_checkpoint(best_checkpoint(given) if command.get("best", yaml.get("best")) else given)
    trained, own = _trained(saved), _own_files(saved)
    if trained is None and not own and config is None and not any(key.startswith("moshi_paths.") for key in command):
        raise ConfigError(
            f"checkpoint_dir={command['checkpoint_dir']!r}: has no training_config.json; give the YAML file of its "
            "training as --config FILE, or its base model as --moshi_paths.hf_repo_id FOLDER."
        )
    saved, told = _with_ttt(saved, command, yaml, f"{config}")
    fixed = _architecture(saved)
    layers = [(COMMAND_LINE, command), (FOLDER, own), (TRAINING_FILE, trained or {}), (f"{config}", yaml)]
    values, sources = {}, {}
    for key, default in flat(dataclasses.asdict(EvalArgs())).items():
        values[key], sources[key] = default, DEFAULT
        if key.startswith(("ttt.", "lora.")):
            if key in fixed:
                values[key], sources[key] = fixed[key], told.get(key, CONFIG_FILE)
            if key in command and key in CHANGEABLE:
                values[key], sources[key] = command[key], COMMAND_LINE
            continue
        for source, layer in layers:
            if key in layer and (source == COMMAND_LINE or layer[key] != ""):
                values[key], sources[key] = layer[key], source
                break
    args = build(EvalArgs, merge({}, {key: value for key, value in values.items() if sources[key] != DEFAULT}))
    if args.by_layer and not saved.config.get("ttt_enabled"):
        raise ConfigError("by_layer=True: the checkpoint has no TTT layers; leave it out.")
    warnings = _compare_with_training(command, fixed)
    args.validate()
    return Settings(args, sources, saved, warnings)


def _read_config(path: Path) -> dict[str, Any]:
    """The settings of a training's YAML file by dotted key; it may also hold those that only an evaluation has."""
    content, notes = in_our_words(read_yaml(path))
    content, more = with_kind_settled(content)
    for note in notes + more:
        logger.info("%s: %s", path, note)
    own = typing.get_type_hints(EvalArgs).keys() - typing.get_type_hints(TrainArgs).keys()
    build(EvalArgs, {key: value for key, value in content.items() if key in own})
    build(TrainArgs, {key: value for key, value in content.items() if key not in own}, roots=(TrainArgs, EvalArgs))
    return flat({key: value for key, value in content.items() if value is not None})


def _with_ttt(
    saved: SavedCheckpoint, command: dict[str, Any], yaml: dict[str, Any], file: str
) -> tuple[SavedCheckpoint, dict[str, str]]:
    """With the `ttt_` keys that its config.json lacks, if anything else says them, and where those come from.

    What the weights contradict is refused with them, before a model is loaded.
    """
    if saved.completed:
        return saved, {ttt_setting(key): TRAINING_FILE for key in saved.config if key.startswith("ttt_")}
    if has_ttt_settings(saved.config):
        return saved, {}
    given = {key: value for key, value in {**yaml, **command}.items() if key.startswith("ttt.")}
    missing = ttt_from(given)
    layers = ((COMMAND_LINE, command), (file, yaml))
    told = {
        (key := ttt_setting(name)): next((source for source, layer in layers if key in layer), DEFAULT)
        for name in missing
    }
    return replace(saved, config=saved.config | missing), told


def _own_files(saved: SavedCheckpoint) -> dict[str, Any]:
    """Where an exported folder holds Mimi and the tokenizer, by dotted key; nothing for a checkpoint without them."""
    try:
        paths = model_paths(saved)
    except ConfigError:
        return {}
    own = paths.config_path == str(saved.folder / CONFIG_FILE)
    return flat({"moshi_paths": dataclasses.asdict(paths)}) if own else {}


def _trained(saved: SavedCheckpoint) -> dict[str, Any] | None:
    """The settings of the training by dotted key."""
    if saved.training is None:
        return None
    content = saved.training.get("training")
    if not isinstance(content, dict):
        raise ConfigError(f"{saved.folder / TRAINING_FILE}: no section 'training'; it is not one that train.py wrote.")
    return flat(content)


def _architecture(saved: SavedCheckpoint) -> dict[str, Any]:
    """`ttt.` and `lora.` settings that the checkpoint's config.json holds, by dotted key."""
    config = saved.config
    names = {"lora": "lora.enable", "lora_rank": "lora.rank", "lora_scaling": "lora.scaling"}
    names |= {key: ttt_setting(key) for key in config if key.startswith("ttt_")}
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
        if key not in CHANGEABLE:
            own = TTTConfig(kind=fixed.get("ttt.kind", defaults["ttt.kind"])).names()
            possible = [one for one in CHANGEABLE if one.removeprefix("ttt.") in own]
            raise ConfigError(
                f"{key}={command[key]!r}: the weights were trained with {trained!r} (config.json); an evaluation "
                f"may change {', '.join(possible)} alone."
            )
        warnings.append(f"{key}={command[key]!r}: the weights were trained with {trained!r}.")
    return warnings
