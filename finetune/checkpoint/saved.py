"""A finished checkpoint as it lies on the disk: its files, the settings it carries, and the model that they make."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, loaders
from moshi.models.loaders import CheckpointInfo

import moshi_patch

from ..common.errors import ConfigError
from ..common.files import read_json
from ..data.text_tokenizer import load_text_tokenizer
from ..model.base import find_base_files
from ..settings.parsing import build
from ..settings.schema import MoshiPaths
from .weights import find_weights

NAMES = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type", "model_id")
GENERATION = ("lm_gen_config", "tts_config", "stt_config")
"""Keys of config.json that are not arguments of `LMModel`, as `CheckpointInfo.from_hf_repo` knows them."""

NOT_ARCHITECTURE = frozenset({*NAMES, *GENERATION, "gradient_checkpointing"})
"""Keys of config.json that may change within a run, and from what was trained to what is served."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """The files of a checkpoint, read but for the weights.

    Attributes:
        weights: `lora.safetensors` or `consolidated.safetensors`.
        config: content of `config.json` beside it.
        training: content of `training_config.json` beside it; None for a checkpoint that has none.
    """

    weights: Path
    config: dict[str, Any]
    training: dict[str, Any] | None

    @property
    def folder(self) -> Path:
        return self.weights.parent

    @property
    def adapters(self) -> bool:
        """Whether the weights are adapters, which need their base model."""
        return bool(self.config.get("lora", False))

    @property
    def lm_kwargs(self) -> dict[str, Any]:
        """The arguments of `LMModel`, and of the loader's (`lora`, ...), in `config`."""
        return {key: value for key, value in self.config.items() if key not in (*NAMES, *GENERATION)}


def open_checkpoint(path: str | Path, key: str = "checkpoint_dir") -> SavedCheckpoint:
    """Finds the checkpoint in a run's folder (its newest), in a checkpoint's or in its `consolidated`.

    Raises:
        ConfigError: when there is none, or its config.json or training_config.json cannot be read; names `key`.
    """
    weights = find_weights(Path(path), key)
    config = weights.with_name("config.json")
    if not config.is_file():
        raise ConfigError(f"{key}={str(path)!r}: no config.json beside {weights}; it says what the weights are.")
    training = weights.with_name("training_config.json")
    return SavedCheckpoint(weights, read_json(config), read_json(training) if training.is_file() else None)


def model_paths(saved: SavedCheckpoint, base: str | None = None) -> MoshiPaths:
    """Where the base model, Mimi and the tokenizer of a checkpoint are: `base`, its own folder, or as it was trained.

    Args:
        base: a Hub repository, a folder laid out like one, or a `.safetensors` file, which replaces the weights alone.

    Raises:
        ConfigError: when none of the three says it.
    """
    if base is not None and not base.endswith(".safetensors"):
        return MoshiPaths(hf_repo_id=base)
    config, folder = saved.config, saved.folder
    names = {key: config.get(key) for key in ("moshi_name", "mimi_name", "tokenizer_name")}
    places = {key: _place(folder, name) for key, name in names.items() if name is not None}
    if len(places) == 3 and None not in places.values():  # an exported folder
        paths = MoshiPaths(None, places["mimi_name"], places["moshi_name"], places["tokenizer_name"])
        paths.config_path = str(folder / "config.json")
    elif saved.training is not None and isinstance(saved.training.get("training"), dict):
        paths = build(MoshiPaths, saved.training["training"].get("moshi_paths"), "moshi_paths")
    elif base is None:
        raise ConfigError(f"{folder}: no training_config.json, so its base model is unknown; give it with --base.")
    else:
        paths = MoshiPaths()
    return paths if base is None else replace(paths, moshi_path=base)


def _place(folder: Path, name: str) -> str | None:
    """What a name in the config.json of an exported folder stands for; None when there is no such file."""
    if name.startswith("hf://"):
        return name
    return str(folder / name) if (folder / name).is_file() else None


def load_model(
    saved: SavedCheckpoint, paths: MoshiPaths, device: torch.device, dtype: torch.dtype
) -> tuple[LMModel, CheckpointInfo]:
    """The model of a checkpoint in eval mode, as a server would load it, and the files of Mimi and the tokenizer.

    Args:
        paths: as the run was trained: of the base model, which adapters need, of Mimi and of the tokenizer.

    Raises:
        ConfigError: as `find_files`.
    """
    info = find_files(saved, paths, weights=saved.adapters)
    return load_language_model(saved, info.moshi_weights if saved.adapters else None, device, dtype), info


def find_files(saved: SavedCheckpoint, paths: MoshiPaths, *, weights: bool) -> CheckpointInfo:
    """The files that a checkpoint needs beside its own: Mimi, the tokenizer and, for adapters, the base model.

    Args:
        weights: False spares downloading the base model.

    Raises:
        ConfigError: as `find_adapter_base`; or when the tokenizer does not fit the checkpoint's own settings.
    """
    info = find_adapter_base(saved, paths, weights=weights) if saved.adapters else find_base_files(paths, weights=False)
    load_text_tokenizer(info.tokenizer, saved.lm_kwargs)
    return info


def find_adapter_base(saved: SavedCheckpoint, paths: MoshiPaths, *, weights: bool = True) -> CheckpointInfo:
    """The base model of the adapters in `saved`, as `find_base_files` finds it.

    Raises:
        ConfigError: as `find_base_files`; or when that model has adapters of its own. Training merges those, and no
            program that is given the others loads them too: they would silently be missing.
    """
    info = find_base_files(paths, weights=weights)
    own = info.lora_weights
    if own is not None and (info.lm_config or {}).get("lora") and own.resolve() != saved.weights.resolve():
        raise ConfigError(
            f"moshi_paths: the base model has adapters of its own, {own}, which would be missing beneath those of "
            f"{saved.folder}. Train again on an export of that base model made with --merge."
        )
    return info


def load_language_model(saved: SavedCheckpoint, base: Path | None, device: torch.device, dtype: torch.dtype) -> LMModel:
    """The model of a checkpoint in eval mode; `base` is the base model's weights for adapters, None otherwise."""
    moshi_patch.install()
    return loaders.get_moshi_lm(
        saved.weights if base is None else base,
        copy.deepcopy(saved.lm_kwargs),  # moshi writes into nested dictionaries
        device=device,
        dtype=dtype,
        lora_weights=None if base is None else saved.weights,
    )
