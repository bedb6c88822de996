"""The audio codec in the files of a model: whether its weights are those that its settings describe, and finite."""

import copy
from pathlib import Path
from typing import Any

import torch
from moshi.models import loaders

import moshi_patch

from ..common.errors import ConfigError, in_one_line
from .tensor_file import broken_values, read_tensors, some


def mimi_problems(weights: Path, config: dict[str, Any] | None) -> list[str]:
    """What is wrong with a Mimi, one sentence each; empty is good. Reads its weights once, and builds no model of them.

    Args:
        config: content of its own configuration; None for the published Mimi's.
    """
    try:
        stored, sizes = read_tensors(weights, "model")
    except ConfigError as error:
        return [str(error)]
    try:
        if config is not None:
            moshi_patch.check_mimi_config(config)
        with torch.device("meta"):
            model = loaders.get_mimi(None, copy.deepcopy(config), device="meta", num_codebooks=1)
    except Exception as error:  # whatever moshi's constructors raise: KeyError, TypeError, AssertionError, ...
        reason = f"{type(error).__name__}: {in_one_line(error)}"
        return [f"{weights}: no codec can be built from its configuration ({reason})."]
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    differing = sorted(name for name in stored.keys() | wanted.keys() if stored.get(name) != wanted.get(name))
    if differing:
        return [f"{weights}: {len(differing)} tensors are not those of its configuration, such as {some(differing)}."]
    return [f"{weights}: {text}" for text in broken_values(sizes)]
