"""All settings of a training run: moshi-finetune's YAML keys and defaults, plus `ttt:`, `checkpoint:`, `init_from`."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from moshi_patch import TTTConfig

from ..common.errors import ConfigError

STEPS_PER_SECOND = 12.5
"""Mimi's frame rate: one step of the language model is 80 ms."""

PARAM_DTYPES = ("bfloat16", "float32", "float16")
INITIAL_TARGETS = ("identity", "readout")
"""Where W_target of a new target generator may begin."""


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
    update: str = "hebbian"
    target_gain: float = 1.0

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
        text_emb_lr: learning rate of the text embedding, which then trains whatever else does; null: as without TTT.
        init_target: where W_target of new target generators begins, one of `INITIAL_TARGETS`.
    """

    train_w_down: bool = True
    optim_lr: float | None = None
    text_emb_lr: float | None = None
    init_target: str = "identity"


@dataclass
class CheckpointArgs:
    """Continue the run in `run_dir`; `resume_step` -1 is the newest complete checkpoint."""

    resume: bool = False
    resume_step: int = -1


@dataclass
class TrainArgs:
    """One training run, as in its YAML file. `validation` says what is wrong with it, and what looks unintended."""

    data: DataArgs = field(default_factory=DataArgs)
    run_dir: str = ""
    moshi_paths: MoshiPaths = field(default_factory=MoshiPaths)
    first_codebook_weight_multiplier: float = 1.0
    text_padding_weight: float = 0.5
    optim: OptimArgs = field(default_factory=OptimArgs)
    seed: int = 0
    num_microbatches: int = 1
    duration_sec: float = 10.0
    batch_size: int = 1
    max_norm: float = 1.0
    max_steps: int = 100
    log_freq: int = 1
    ckpt_freq: int = 0
    save_adapters: bool = True
    do_ckpt: bool = True
    num_ckpt_keep: int | None = 3
    eval_freq: int = 0
    do_eval: bool = False
    gradient_checkpointing: bool = True
    wandb: WandbArgs = field(default_factory=WandbArgs)
    lora: LoraArgs = field(default_factory=LoraArgs)
    full_finetuning: bool = False
    param_dtype: str = "bfloat16"
    overwrite_run_dir: bool = False
    ttt: TTTArgs = field(default_factory=TTTArgs)
    checkpoint: CheckpointArgs = field(default_factory=CheckpointArgs)
    init_from: str | None = None
