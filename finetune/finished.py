"""A finished checkpoint as it lies on the disk: its files, the settings it carries, and the model that they make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, loaders
from moshi.models.loaders import CheckpointInfo

import moshi_patch

from .args import MoshiPaths
from .base import find_checkpoint
from .parsing import ConfigError, read_json
from .weights import find_finished

NAMES = ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name", "lora_name", "model_type", "model_id")
GENERATION = ("lm_gen_config", "tts_config", "stt_config")
"""Keys of config.json that are not arguments of `LMModel`, as `CheckpointInfo.from_hf_repo` knows them."""


@dataclass(frozen=True)
class Finished:
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


def open_finished(path: str | Path, key: str = "checkpoint_dir") -> Finished:
    """Finds the checkpoint in a run's folder (its newest), in a checkpoint's or in its `consolidated`.

    Raises:
        ConfigError: when there is none, or its config.json or training_config.json cannot be read; names `key`.
    """
    weights = find_finished(Path(path), key)
    config = weights.with_name("config.json")
    if not config.is_file():
        raise ConfigError(f"{key}={str(path)!r}: no config.json beside {weights}; it says what the weights are.")
    training = weights.with_name("training_config.json")
    return Finished(weights, read_json(config), read_json(training) if training.is_file() else None)


def load_model(
    finished: Finished, paths: MoshiPaths, device: torch.device, dtype: torch.dtype
) -> tuple[LMModel, CheckpointInfo]:
    """The model of a checkpoint in eval mode, as a server would load it, and the files of Mimi and the tokenizer.

    Args:
        paths: as the run was trained: of the base model, which adapters need, of Mimi and of the tokenizer.
    """
    moshi_patch.install()
    info = find_checkpoint(paths, weights=finished.adapters)
    model = loaders.get_moshi_lm(
        info.moshi_weights if finished.adapters else finished.weights,
        finished.lm_kwargs,
        device=device,
        dtype=dtype,
        lora_weights=finished.weights if finished.adapters else None,
    )
    return model, info
