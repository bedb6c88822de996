"""The settings of a run as it records them, and as they are read again."""

import copy
import dataclasses
from typing import Any

from .parsing import build
from .schema import TrainArgs


def to_dict(args: TrainArgs) -> dict[str, Any]:
    """Nested dictionaries for `training_config.json`. The key of Weights & Biases is a secret and left out (null)."""
    content = dataclasses.asdict(args)
    content["wandb"]["key"] = None
    return content


def from_dict(content: dict[str, Any]) -> TrainArgs:
    """The inverse of `to_dict`, as strict as `load_args`."""
    return build(TrainArgs, copy.deepcopy(content))
