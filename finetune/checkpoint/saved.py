"""A saved checkpoint: finds its files, reads its settings, and loads its model."""

import copy
import functools
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from moshi.models import LMModel, loaders
from moshi.models.loaders import CheckpointInfo

import moshi_patch

from ..common.errors import ConfigError
from ..data.text_tokenizer import load_text_tokenizer
from ..model.base import find_base_files, refuse_not_finite
from ..model.tensor_file import DTYPES, main_dtype, read_header
from ..settings.parsing import build
from ..settings.schema import MoshiPaths, TrainArgs
from .base_fingerprint import BaseFingerprint, load_over_base, read_base_fingerprint
from .folders import TRAINED, find_weights
from .training_file import read_training, settings_of_training
from .ttt_settings import ttt_of_training
from .weights import ttt_tensors

NOT_ARCHITECTURE = frozenset({*moshi_patch.NOT_ARGUMENTS, "gradient_checkpointing", "ttt_scan_checkpoint_group_size"})
"""Keys of config.json that say nothing about the weights: they may differ between training and serving."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedCheckpoint:
    """The files of a checkpoint, with its settings read; the weights are not.

    Attributes:
        weights: `lora.safetensors`, `consolidated.safetensors` or `ttt.safetensors`.
        config: content of `config.json` beside it.
        training: content of `training_config.json` beside it; None for a checkpoint that has none.
        completed: whether the `ttt_` keys of `config` are those of `training`, as config.json has none.
    """

    weights: Path
    config: dict[str, Any]
    training: dict[str, Any] | None
    completed: bool = False

    @property
    def folder(self) -> Path:
        return self.weights.parent

    @property
    def adapters(self) -> bool:
        """Whether the weights are adapters, which need their base model."""
        return bool(self.config.get("lora", False))

    @functools.cached_property
    def base_fingerprint(self) -> BaseFingerprint | None:
        """Of the base model that `ttt.safetensors` was trained over."""
        return read_base_fingerprint(self.weights)

    @property
    def trained_alone(self) -> bool:
        """Whether the weights are what `training_mode: ttt` trained, without its base model."""
        return self.weights.name == TRAINED or self.base_fingerprint is not None

    @property
    def needs_base(self) -> bool:
        """Whether the weights are a part of a model, to be loaded over its base."""
        return self.adapters or self.trained_alone

    @property
    def lm_kwargs(self) -> dict[str, Any]:
        """The arguments of `LMModel`, and of the loader's (`lora`, ...), in `config`."""
        return {key: value for key, value in self.config.items() if key not in moshi_patch.NOT_ARGUMENTS}

    @property
    def train_args(self) -> TrainArgs | None:
        """The settings of the training; those that this version does not know are left out."""
        if self.training is None or not isinstance(self.training.get("training"), dict):
            return None
        return settings_of_training(self.training["training"])

    @property
    def dtype(self) -> torch.dtype:
        """The precision of most of its tensors."""
        names = {stored: name for name, stored in DTYPES.items()}
        return getattr(torch, names.get(main_dtype(read_header(self.weights)), "bfloat16"))

    @property
    def run_dir(self) -> Path | None:
        """The folder of its run; None for a checkpoint that does not lie in one, such as an export."""
        checkpoint = self.folder.resolve().parent
        inside = self.folder.name == "consolidated" and checkpoint.parent.name == "checkpoints"
        return checkpoint.parent.parent if inside else None

    @property
    def step(self) -> int | None:
        """The number of steps after which it was saved; None where that is not recorded."""
        return (self.training or {}).get("step")


def open_checkpoint(path: str | Path, key: str = "checkpoint_dir") -> SavedCheckpoint:
    """Finds the checkpoint in a run's folder (its newest), in a checkpoint's or in its `consolidated`.

    Raises:
        ConfigError: when there is none, or its config.json or training_config.json is not of a checkpoint; names `key`.
    """
    weights = find_weights(Path(path), key)
    config = weights.with_name("config.json")
    if not config.is_file():
        raise ConfigError(f"{key}={str(path)!r}: no config.json beside {weights}; it says what the weights are.")
    try:
        content = moshi_patch.read_model_config(config)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}={str(path)!r}: {error}") from error
    for name in filter(None, map(content.get, moshi_patch.FILE_KEYS)):
        _place(weights.parent, name)  # refused when it leads elsewhere, whoever reads it
    training = weights.with_name("training_config.json")
    saved = SavedCheckpoint(weights, content, read_training(training) if training.is_file() else None)
    missing = ttt_of_training(content, saved.training, saved.train_args)
    if missing:
        logger.info("%s has no ttt_ keys; they are taken from %s.", config, training.name)
    return replace(saved, config=content | missing, completed=bool(missing))


def model_paths(saved: SavedCheckpoint, base: str | None = None) -> MoshiPaths:
    """Where the base model, Mimi and the tokenizer of a checkpoint are: `base`, its own folder, or as it was trained.

    Args:
        base: a Hub repository, a folder laid out like one, or a `.safetensors` file, which replaces the weights alone.

    Raises:
        ConfigError: when that is recorded nowhere.
    """
    if base is not None and not base.endswith(".safetensors"):
        return MoshiPaths(hf_repo_id=base)
    folder, places = saved.folder, _own_places(saved)
    if places is not None:
        paths = MoshiPaths(None, places["mimi_name"], places["moshi_name"], places["tokenizer_name"])
        paths.config_path = str(folder / "config.json")
    elif (trained := (saved.training or {}).get("training", {}).get("moshi_paths")) is not None:
        paths = build(MoshiPaths, trained, "moshi_paths")
    elif base is None:
        what = "no training_config.json" if saved.training is None else "files that config.json names are not there"
        raise ConfigError(f"{folder}: {what}, so its base model is unknown; give it with --base.")
    else:
        paths = MoshiPaths()
    return paths if base is None else replace(paths, moshi_path=base)


def own_files(saved: SavedCheckpoint) -> dict[str, Path]:
    """The files of an exported folder by their keys in config.json; empty for another checkpoint, as a run's.

    Raises:
        ConfigError: when config.json names a file elsewhere, or one of an exported folder is not there.
    """
    places = _own_places(saved)
    if places is None:
        return {}
    name = saved.config.get("mimi_config_name")
    if name is not None:
        places["mimi_config_name"] = _place(saved.folder, name)
        if places["mimi_config_name"] is None:
            raise ConfigError(f"{saved.folder / 'config.json'} names {name!r}, and there is no such file.")
    return {key: Path(place) for key, place in places.items() if not place.startswith(moshi_patch.HUB)}


def _own_places(saved: SavedCheckpoint) -> dict[str, str] | None:
    """Where an exported folder has its files, or names them on the Hub; None for another checkpoint.

    A run's config.json names the files of its base model, which do not lie beside it.
    """
    names = {key: saved.config.get(key) for key in ("moshi_name", "mimi_name", "tokenizer_name")}
    places = {key: _place(saved.folder, name) for key, name in names.items() if name is not None}
    return places if len(places) == 3 and None not in places.values() else None


def _place(folder: Path, name: str) -> str | None:
    """The file, or place on the Hub, that a name in the config.json of `folder` means; None when it is not there."""
    try:
        return str(moshi_patch.named_file(folder, folder, name))
    except LocalEntryNotFoundError:
        return None
    except moshi_patch.RepositoryError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error


def load_model(
    saved: SavedCheckpoint, paths: MoshiPaths, device: torch.device, dtype: torch.dtype
) -> tuple[LMModel, CheckpointInfo]:
    """The model of a checkpoint in eval mode, as a server would load it, and the files of Mimi and the tokenizer.

    Args:
        paths: as the run was trained: of the base model, which adapters need, of Mimi and of the tokenizer.

    Raises:
        ConfigError: as `find_files`.
    """
    info = find_files(saved, paths, weights=saved.needs_base)
    return load_language_model(saved, info.moshi_weights if saved.needs_base else None, device, dtype), info


def find_files(saved: SavedCheckpoint, paths: MoshiPaths, *, weights: bool) -> CheckpointInfo:
    """The files that a checkpoint needs beside its own: Mimi, the tokenizer and, for adapters, the base model.

    Args:
        weights: False spares downloading the base model.

    Raises:
        ConfigError: as `find_adapter_base`; or when the tokenizer does not fit the checkpoint's own settings.
    """
    needed = saved.needs_base
    info = find_adapter_base(saved, paths, weights=weights) if needed else find_base_files(paths, weights=False)
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
    """The model of a checkpoint in eval mode; `base` is the base model's weights where it needs one, None otherwise.

    Raises:
        ConfigError: when a weight of the base model is not finite; nobody has looked at them yet. Or when it is not the
            base that weights which trained alone belong to.
    """
    moshi_patch.install()
    if saved.trained_alone:
        model = load_over_base(saved.weights, base, saved.lm_kwargs, device, dtype, base_remedy(saved))
        logger.info("Loaded %s: %s", saved.weights, ttt_tensors(saved.weights, model))
        return model
    model = loaders.get_moshi_lm(
        saved.weights if base is None else base,
        copy.deepcopy(saved.lm_kwargs),  # moshi writes into nested dictionaries
        device=device,
        dtype=dtype,
        lora_weights=None if base is None else saved.weights,
    )
    if base is not None:
        refuse_not_finite(model, f"{base} with the adapters {saved.weights}")
    logger.info("Loaded %s: %s", saved.weights, ttt_tensors(saved.weights, model))
    return model


def base_remedy(saved: SavedCheckpoint) -> str:
    """What to do where another base model is there than `saved` was trained over."""
    trained = saved.train_args
    began = f", whose base is the model of init_from={trained.init_from!r}" if trained and trained.init_from else ""
    return f"Give the one that {saved.weights} was trained over{began}, with --base or moshi_paths."
