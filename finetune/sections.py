"""The sections of a run's settings, as in its YAML file, and what each can check by itself."""

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moshi_patch import TTTConfig

from .parsing import ConfigError


@dataclass
class DataArgs:
    """Lists of files: a `.jsonl`, a folder of them, or several joined by commas, each with an optional `:weight`."""

    train_data: str = ""
    eval_data: str = ""
    shuffle: bool = False


@dataclass
class MoshiPaths:
    """The base model: a Hub repository, and files that replace some or all of its own."""

    hf_repo_id: str | None = "kyutai/moshiko-pytorch-bf16"
    mimi_path: str | None = None
    moshi_path: str | None = None
    tokenizer_path: str | None = None
    config_path: str | None = None


@dataclass
class OptimArgs:
    """AdamW (betas 0.9 and 0.95, eps 1e-8) under OneCycleLR; `pct_start` is the warm-up's share of all steps."""

    lr: float = 1e-4
    weight_decay: float = 0.1
    pct_start: float = 0.05


@dataclass
class LoraArgs:
    """Adapters on every linear layer; `ft_embed` trains the embeddings in full beside them."""

    enable: bool = False
    rank: int = 64
    scaling: float = 2.0
    ft_embed: bool = False


@dataclass
class WandbArgs:
    """Weights & Biases; off while `project` is null."""

    project: str | None = None
    offline: bool = False
    key: str | None = None
    run_name: str | None = None


@dataclass
class TTTSettings:
    """`moshi_patch.TTTConfig`, whose documentation holds, as a section of settings."""

    enabled: bool = False
    layer_frequency: int = 6
    start_layer: int = 5
    layers: list[int] | str | None = None
    chunk_size: int = 256
    learning_rate: float = 1e-3
    conv_kernel_size: int = 2
    conv_depthwise: bool = True
    target: str = "token_embeddings"
    delta_clip: float | None = None
    decay: float = 1.0

    def lm_kwargs(self) -> dict[str, Any]:
        """The `ttt_*` keyword arguments of `LMModel`, all of them, also while TTT is off.

        Raises:
            ConfigError: naming the YAML key (`ttt.chunk_size=0`), and what is allowed.
        """
        settings = {item.name: getattr(self, item.name) for item in dataclasses.fields(TTTConfig)}
        try:
            return TTTConfig(**settings).to_kwargs()
        except ValueError as error:
            raise ConfigError(re.sub(r"\bttt_", "ttt.", str(error))) from error


@dataclass
class TTTArgs(TTTSettings):
    """The settings of TTT, and what only training needs.

    Args:
        train_w_down: train the base W_down of the TTT layers too, in full also under LoRA.
        optim_lr: learning rate of the target generators; null: a multiple of `optim.lr`, stated by the trainer.
    """

    train_w_down: bool = True
    optim_lr: float | None = None


@dataclass
class CheckpointArgs:
    """Continue the run in `run_dir`; `resume_step` -1 is the newest complete checkpoint."""

    resume: bool = False
    resume_step: int = -1


def check_moshi_paths(paths: MoshiPaths, *, weights: bool = True) -> None:
    """That local files are there.

    Args:
        weights: False: nobody will read those of the language model.

    Raises:
        ConfigError: naming the key.
    """
    names = ("mimi_path", "moshi_path", "tokenizer_path", "config_path")
    for name in names if weights else [name for name in names if name != "moshi_path"]:
        path = getattr(paths, name)
        remedy = "is required while moshi_paths.hf_repo_id is null."
        _require(path is not None or paths.hf_repo_id is not None, paths, name, remedy)
        local = path is not None and not path.startswith("hf://")
        exists = not local or Path(path.removeprefix("file://")).is_file()
        _require(exists, paths, name, "no such file; correct the path, or null for the repository's.")
    repo = paths.hf_repo_id
    known = repo is None or Path(repo).is_dir() or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) is not None
    _require(known, paths, "hf_repo_id", "must be OWNER/NAME on the Hub, or a folder that exists.")


def _require(holds: bool, paths: MoshiPaths, name: str, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"moshi_paths.{name}={getattr(paths, name)!r}: {remedy}")
