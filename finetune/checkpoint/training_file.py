"""`training_config.json` beside a checkpoint's weights: how they were trained, as any version or plan writes it."""

import logging
import typing
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from ..common.files import read_json
from ..settings.parsing import build
from ..settings.plan_words import in_our_words, with_kind_settled
from ..settings.record import with_paths_found, working_directories
from ..settings.schema import TrainArgs

OF_PLANS = "of_plans"
"""Key of a `training_config.json`, once it is read, that was not written by this project's training."""

TOP_LEVEL = frozenset(typing.get_type_hints(TrainArgs))

logger = logging.getLogger(__name__)


def read_training(path: Path) -> dict[str, Any]:
    """Content of a `training_config.json`; its relative paths begin where the run was started, if they are there.

    The settings may also stand at the top, as in the plans of this project (`OF_PLANS` is then true), and in its words.

    Raises:
        ConfigError: when it cannot be read, or holds what no training writes.
    """
    content = read_json(path)
    if "training" not in content and "lm_config" not in content and content.keys() & TOP_LEVEL:
        content = {"training": content, OF_PLANS: True}
    kinds = {"training": dict, "lm_config": dict, "versions": dict, "step": int, "world_size": int}
    for key, kind in kinds.items():
        if key in content and (not isinstance(content[key], kind) or isinstance(content[key], bool)):
            raise ConfigError(f"{path}: {key} must be {'an object' if kind is dict else 'a whole number'}.")
    if "training" in content:
        try:
            content["training"], notes = in_our_words(content["training"])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        for note in notes:
            logger.info("%s: %s", path, note)
    try:
        settings_of_training(content.get("training", {}))  # it raises for a value of a wrong kind
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if "training" in content:
        content["training"] = with_paths_found(content["training"], working_directories(content, path.parent))
    return content


def settings_of_training(content: dict[str, Any]) -> TrainArgs:
    """The section `training`; what this version does not know is left out.

    Raises:
        ConfigError: for a value of a wrong kind.
    """
    settled, _ = with_kind_settled(content)
    return build(TrainArgs, _known_settings(TrainArgs, settled))


def _known_settings(cls: type, content: dict[str, Any]) -> dict[str, Any]:
    """`content` without the keys that the dataclass `cls` does not have, at every depth."""
    hints = typing.get_type_hints(cls)
    return {
        key: _known_settings(hints[key], value) if is_dataclass(hints[key]) and isinstance(value, dict) else value
        for key, value in content.items()
        if key in hints
    }
