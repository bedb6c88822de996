"""Whether a checkpoint's weights are those that its settings describe, seen from the file's header alone."""

import contextlib
import copy
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from moshi.models import LMModel, loaders

import moshi_patch

from ..common.differences import differences
from ..common.errors import ConfigError, in_one_line
from ..model.conditions import ALWAYS_FLOAT32
from ..model.tensor_file import DTYPES, Stored, main_dtype, read_header, some
from ..model.trainable import parameter_groups
from .base_fingerprint import NO_FINGERPRINT
from .saved import NOT_ARCHITECTURE, SavedCheckpoint
from .training_file import OF_PLANS
from .weights import saved_tensors

LAYER = re.compile(r"transformer\.layers\.(\d+)\.")
CONV = f"target_generator.{moshi_patch.TARGET_KEYS[0]}"

NEW_WEIGHTS = {"in_place": "target generators", "mlp": "TTT layers"}
"""By kind of memory, what the weights are called that a stock model has not."""


def contradictions(saved: SavedCheckpoint) -> list[str]:
    """What the weights and the settings of a checkpoint say against each other, one sentence each; empty is good.

    Compared are `config.json` with what was trained, in `training_config.json`, and names, shapes and dtypes of all
    tensors with those of the model that `config.json` describes. That model is built without memory.

    Raises:
        ConfigError: when the file of weights cannot be read.
    """
    stored = read_header(saved.weights)
    found = _other_than_trained(saved)
    try:
        with patched():
            model = described_model(saved)
            layers = [int(name.split(".")[2]) for name in moshi_patch.ttt_memories(model)]
    except Exception as error:  # whatever moshi's constructors raise: KeyError, TypeError, AssertionError, ...
        return [*found, f"config.json: no model can be built from it: {type(error).__name__}: {in_one_line(error)}."]
    if saved.trained_alone and saved.base_fingerprint is None:
        found.append(f"{saved.weights.name}: {NO_FINGERPRINT}")
    found += _other_adapters(saved, stored)
    found += _other_targets(saved, stored, layers)
    return found + _other_tensors(saved, stored, model)


def base_contradictions(saved: SavedCheckpoint, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """What is wrong with tensors of these `shapes` as the base model of the adapters in `saved`; empty is good."""
    with patched():
        wanted = saved_tensors(described_model(saved), adapters=False)
    differing = [
        name
        for name, tensor in wanted.items()
        if not moshi_patch.memory_key(name) and shapes.get(name) != tuple(tensor.shape)
    ]
    if not differing:
        return []
    return [f"{len(differing)} tensors are missing, or not of the shape that these adapters need: {some(differing)}."]


def described_model(saved: SavedCheckpoint) -> LMModel:
    """The model that `config.json` describes, adapters included, on the meta device; needs the patch installed.

    What trains in it is what `training_config.json` says, nothing if there is none.
    """
    with torch.device("meta"):  # moshi makes its heads in memory otherwise
        # a copy: moshi's constructors write into nested dictionaries
        model = loaders.get_moshi_lm(None, copy.deepcopy(saved.lm_kwargs), device="meta", dtype=torch.bfloat16)
    model.requires_grad_(False)
    if saved.train_args is not None:
        with contextlib.suppress(ConfigError):  # settings of another version: then what serving needs is compared
            for group in parameter_groups(model, saved.train_args):
                for parameter in group.parameters.values():
                    parameter.requires_grad_(True)
    return model


@contextlib.contextmanager
def patched() -> Iterator[None]:
    """The patch is installed inside; afterwards it is what it was."""
    before = moshi_patch.is_installed()
    moshi_patch.install()
    try:
        yield
    finally:
        if not before:
            moshi_patch.uninstall()


def listed(layers: Collection[int]) -> str:
    """`layers 1, 3`, or `no layer`."""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, sorted(layers)))}" if layers else "no layer"


def _other_than_trained(saved: SavedCheckpoint) -> list[str]:
    """`config.json` against `training_config.json`; names of files and settings of generation may differ."""
    if saved.training is None or saved.training.get(OF_PLANS):
        return []
    trained = saved.training.get("lm_config")
    if not isinstance(trained, dict) or not isinstance(saved.training.get("training"), dict):
        return ["training_config.json: has no lm_config and training; it is not one that train.py wrote."]
    merged = (
        () if saved.adapters else moshi_patch.LORA_KEYS
    )  # they are in the weights then, and config.json rightly has none
    keys = (saved.config.keys() | trained.keys()) - {*NOT_ARCHITECTURE, *merged}
    wording = "{key}={one!r} in config.json, and {other!r} was trained (training_config.json)."
    return differences(saved.config, trained, wording, keys)


def _other_adapters(saved: SavedCheckpoint, stored: dict[str, Stored]) -> list[str]:
    name, lora = saved.weights.name, saved.config.get("lora", False)
    ranks = {value.shape[0] for key, value in stored.items() if key.endswith(".lora_A.weight") and value.shape}
    rank = saved.config.get("lora_rank", 128)  # moshi's default
    if saved.adapters and not ranks:
        return [f"lora=True in config.json, and {name} has no adapters."]
    if not saved.adapters and ranks:
        return [f"lora={lora!r} in config.json, and {name} has adapters."]
    if saved.adapters and ranks != {rank}:
        return [f"lora_rank={rank!r} in config.json, and the adapters have rank {', '.join(map(str, sorted(ranks)))}."]
    return []


def _other_targets(saved: SavedCheckpoint, stored: dict[str, Stored], layers: list[int]) -> list[str]:
    """Which layers have new weights, of which kind, and with which convolution."""
    kinds: dict[str, set[int]] = {}
    convolutions: dict[tuple[int, ...], set[int]] = {}
    for name, value in stored.items():
        if found_key := moshi_patch.memory_key(name):
            kinds.setdefault(found_key.kind, set()).add(found_key.layer)
            if found_key.key == CONV:
                convolutions.setdefault(value.shape, set()).add(found_key.layer)
    config, found = moshi_patch.TTTConfig().to_kwargs() | saved.config, []
    kind = config.get("ttt_kind", "in_place")
    found += [
        f"ttt_kind={kind!r} in config.json, and {saved.weights.name} has {NEW_WEIGHTS[other]} in {listed(members)}."
        for other, members in sorted(kinds.items())
        if other != kind and layers
    ]
    here = kinds.get(kind, set())
    if set(layers) != here and not found:
        found.append(
            f"{_selection(config)} selects {listed(layers)}, and {saved.weights.name} has {NEW_WEIGHTS[kind]} in "
            f"{listed(here)}."
        )
    for shape, members in sorted(convolutions.items()):
        kernel, depthwise = config["ttt_conv_kernel_size"], config["ttt_conv_depthwise"]
        if layers and kind == "in_place" and len(shape) == 3 and (shape[2] != kernel or (shape[1] == 1) != depthwise):
            found.append(
                f"ttt_conv_kernel_size={kernel!r} and ttt_conv_depthwise={depthwise!r} in config.json, and "
                f"the convolution of {listed(members)} has {shape[2]} taps and is "
                f"{'depthwise' if shape[1] == 1 else 'full'}."
            )
    return found


def _selection(config: dict[str, Any]) -> str:
    if not config["ttt_enabled"]:
        return "ttt_enabled=False"
    if config["ttt_layers"] is not None:
        return f"ttt_layers={config['ttt_layers']!r}"
    start, frequency = config["ttt_start_layer"], config["ttt_layer_frequency"]
    return f"ttt_start_layer={start!r} with ttt_layer_frequency={frequency!r}"


def _other_tensors(saved: SavedCheckpoint, stored: dict[str, Stored], model: LMModel) -> list[str]:
    """Names, shapes and dtypes against those of `model`."""
    alone = saved.trained_alone
    wanted = saved_tensors(model, adapters=saved.adapters, trained_alone=alone)
    possible = wanted
    if saved.needs_base and saved.training is None:  # who knows what else was trained
        possible = wanted | saved_tensors(model, adapters=False)
    dtypes = _dtypes(saved, stored, possible)
    problems = {
        "missing": [name for name in wanted if name not in stored],
        "not of the model that config.json describes": [name for name in stored if name not in possible],
        "of another shape": [
            f"{name} {list(stored[name].shape)}, not {list(tensor.shape)}"
            for name, tensor in possible.items()
            if name in stored and stored[name].shape != tuple(tensor.shape)
        ],
        "of another dtype": [
            f"{name} {stored[name].dtype}, not {dtypes[name]}"
            for name in stored
            if name in possible and stored[name].dtype != dtypes[name]
        ],
    }
    layers = {int(match[1]) for name in stored if (match := LAYER.match(name))}
    count, found = saved.config.get("num_layers"), []
    if layers and len(layers) != count and not alone:
        found = [f"num_layers={count!r} in config.json, and {saved.weights.name} has {len(layers)} layers."]
    return found + [
        f"{saved.weights.name}: {len(names)} tensor{'s' * (len(names) > 1)} {what}: {_some(names)}."
        for what, names in problems.items()
        if names
    ]


def _dtypes(saved: SavedCheckpoint, stored: dict[str, Stored], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """What each tensor is to be: the precision of the training, or else of most tensors; conditioners float32."""
    trained = (saved.training or {}).get("training", {}).get("param_dtype")
    usual = DTYPES.get(str(trained)) or main_dtype(stored)
    number = {name for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {
        name: ("F32" if name.startswith(ALWAYS_FLOAT32) else usual) if name in number else value.dtype
        for name, value in stored.items()
    }


def _some(names: list[str]) -> str:
    """The first few of `names`, TTT keys before others."""
    return some(sorted(names, key=lambda name: (moshi_patch.memory_key(name.partition(" ")[0]) is None, name)))
