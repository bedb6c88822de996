"""Whether a checkpoint's weights are those that its settings describe, seen from the file's header alone."""

import contextlib
import copy
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, loaders
from safetensors import SafetensorError, safe_open

import moshi_patch

from ..common.errors import ConfigError
from ..model.base import TTT_KEY
from ..model.trainable import parameter_groups
from ..settings.record import from_dict
from .saved import NOT_ARCHITECTURE, SavedCheckpoint
from .weights import saved_tensors

TARGET = re.compile(TTT_KEY.pattern + "(.+)")
LAYER = re.compile(r"transformer\.layers\.(\d+)\.")
CONV = "conv1d.conv.weight"
LORA = ("lora", "lora_rank", "lora_scaling")
DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of torch -> names in a safetensors file."""

FLOAT32 = ("condition_provider.", "fuser.")
"""Beginnings of names that are in float32 whatever the rest is."""


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of a safetensors file describes it; `dtype` as there, such as `"BF16"`."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name.

    Raises:
        ConfigError: for a file that is empty, truncated or no safetensors file, and says which.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no mapping
            return {name: Stored(tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: {_damage(path, error)}") from error


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
            layers = [int(name.split(".")[2]) for name in moshi_patch.ttt_gatings(model)]
    except Exception as error:  # whatever moshi's constructors raise: KeyError, TypeError, AssertionError, ...
        return [*found, f"config.json: no model can be built from it: {type(error).__name__}: {error}"]
    found += _other_adapters(saved, stored)
    found += _other_targets(saved, stored, layers)
    return found + _other_tensors(saved, stored, model)


def described_model(saved: SavedCheckpoint) -> LMModel:
    """The model that `config.json` describes, adapters included, on the meta device; needs the patch installed.

    What trains in it is what `training_config.json` says, nothing if there is none.
    """
    # a copy: moshi's constructors write into nested dictionaries
    model = loaders.get_moshi_lm(None, copy.deepcopy(saved.lm_kwargs), device="meta", dtype=torch.bfloat16)
    model.requires_grad_(False)
    if saved.training is not None:
        with contextlib.suppress(ConfigError):  # settings of another version: then what serving needs is compared
            for group in parameter_groups(model, from_dict(saved.training["training"])):
                for parameter in group.parameters.values():
                    parameter.requires_grad_(True)
    return model


def stored_dtype(saved: SavedCheckpoint) -> torch.dtype:
    """The precision of most of its tensors."""
    most = Counter(one.dtype for one in read_header(saved.weights).values()).most_common(1)
    names = {short: name for name, short in DTYPES.items()}
    return getattr(torch, names.get(most[0][0] if most else "", "bfloat16"))


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


def _damage(path: Path, error: Exception) -> str:
    """Why a safetensors file cannot be read: 8 bytes of length, a header of that length, then the tensors."""
    if not path.is_file():
        return "no such file."
    size = path.stat().st_size
    if size == 0:
        return "is empty (0 bytes)."
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else {}
            ends = [value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return f"is not a safetensors file ({error})."
    if 8 + length > size:
        return f"is truncated, or not a safetensors file: {size} bytes, and its header alone would take {8 + length}."
    whole = 8 + length + max(ends, default=0)
    if size < whole:
        return f"is truncated: {size} bytes of {whole}."
    return f"is damaged: {error}."


def _other_than_trained(saved: SavedCheckpoint) -> list[str]:
    """`config.json` against `training_config.json`; names of files and settings of generation may differ."""
    if saved.training is None:
        return []
    trained = saved.training.get("lm_config")
    if not isinstance(trained, dict) or not isinstance(saved.training.get("training"), dict):
        return ["training_config.json: has no lm_config and training; it is not one that train.py wrote."]
    merged = () if saved.adapters else LORA  # they are in the weights then, and config.json rightly has none
    ignored = {*NOT_ARCHITECTURE, *merged}
    return [
        f"{key}={saved.config.get(key)!r} in config.json, and {trained.get(key)!r} was trained (training_config.json)."
        for key in sorted((saved.config.keys() | trained.keys()) - ignored)
        if saved.config.get(key) != trained.get(key)
    ]


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
    """Which layers have target generators, complete ones, and with which convolution."""
    keys: dict[int, set[str]] = {}
    convolutions: dict[tuple[int, ...], set[int]] = {}
    for name, value in stored.items():
        if match := TARGET.fullmatch(name):
            keys.setdefault(int(match[1]), set()).add(match[2])
            if match[2] == CONV:
                convolutions.setdefault(value.shape, set()).add(int(match[1]))
    config, found = saved.config, []
    if set(layers) != keys.keys():
        found.append(
            f"{_selection(config)} selects {listed(layers)}, and {saved.weights.name} has target generators in "
            f"{listed(keys.keys())}."
        )
    for shape, members in sorted(convolutions.items()):
        kernel, depthwise = config.get("ttt_conv_kernel_size", 2), config.get("ttt_conv_depthwise", True)
        if layers and len(shape) == 3 and (shape[2] != kernel or (shape[1] == 1) != depthwise):
            found.append(
                f"ttt_conv_kernel_size={kernel!r} and ttt_conv_depthwise={depthwise!r} in config.json, and "
                f"the convolution of {listed(members)} has {shape[2]} taps and is "
                f"{'depthwise' if shape[1] == 1 else 'full'}."
            )
    return found


def _selection(config: dict[str, Any]) -> str:
    if not config.get("ttt_enabled", False):
        return "ttt_enabled=False"
    if config.get("ttt_layers") is not None:
        return f"ttt_layers={config['ttt_layers']!r}"
    start, frequency = config.get("ttt_start_layer", 5), config.get("ttt_layer_frequency", 6)
    return f"ttt_start_layer={start!r} with ttt_layer_frequency={frequency!r}"


def _other_tensors(saved: SavedCheckpoint, stored: dict[str, Stored], model: LMModel) -> list[str]:
    """Names, shapes and dtypes against those of `model`."""
    wanted = {name: tuple(value.shape) for name, value in saved_tensors(model, adapters=saved.adapters).items()}
    possible = wanted
    if saved.adapters and saved.training is None:  # who knows what else was trained
        possible = wanted | {name: tuple(value.shape) for name, value in saved_tensors(model, adapters=False).items()}
    dtypes = _dtypes(saved, stored)
    problems = {
        "missing": [name for name in wanted if name not in stored],
        "not of the model that config.json describes": [name for name in stored if name not in possible],
        "of another shape": [
            f"{name} {list(stored[name].shape)}, not {list(shape)}"
            for name, shape in possible.items()
            if name in stored and stored[name].shape != shape
        ],
        "of another dtype": [
            f"{name} {stored[name].dtype}, not {dtypes[name]}"
            for name in stored
            if name in possible and stored[name].dtype != dtypes[name]
        ],
    }
    layers = {int(match[1]) for name in stored if (match := LAYER.match(name))}
    count, found = saved.config.get("num_layers"), []
    if layers and len(layers) != count:
        found = [f"num_layers={count!r} in config.json, and {saved.weights.name} has {len(layers)} layers."]
    return found + [
        f"{saved.weights.name}: {len(names)} tensor{'s' * (len(names) > 1)} {what}: {_some(names)}."
        for what, names in problems.items()
        if names
    ]


def _dtypes(saved: SavedCheckpoint, stored: dict[str, Stored]) -> dict[str, str]:
    """What each tensor is to be: the precision of the training, or else of most tensors; conditioners float32."""
    trained = (saved.training or {}).get("training", {}).get("param_dtype")
    most = Counter(value.dtype for value in stored.values()).most_common(1)
    usual = DTYPES.get(str(trained)) or (most[0][0] if most else "")
    floats = DTYPES.values()
    return {
        name: ("F32" if name.startswith(FLOAT32) else usual) if value.dtype in floats else value.dtype
        for name, value in stored.items()
    }


def _some(names: list[str]) -> str:
    """The first few of `names`, TTT keys before others."""
    first = sorted(names, key=lambda name: (TARGET.match(name) is None, name))[:3]
    return ", ".join(first) + (f" (and {len(names) - len(first)} more)" if len(names) > len(first) else "")
