"""All settings of a training run: moshi-finetune's YAML keys and defaults, plus `ttt:`, `checkpoint:`, `init_from`."""

import copy
import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moshi_patch import TTTConfig

from .parsing import ConfigError, build, override, read_yaml
from .validation import STEPS_PER_SECOND, validate


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
        text_emb_lr: learning rate of the text embedding, which then trains whatever else does; null: as without TTT.
        init_target: where W_target of new target generators begins, one of `target_init.KINDS`.
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
    """One training run, as in its YAML file. `validate()` checks it, `warnings()` says what looks unintended."""

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

    def validate(self) -> None:
        """Everything that can be known before a model is loaded; looks at files but opens none.

        Raises:
            ConfigError: a ValueError that names the key, its value and the remedy.
        """
        validate(self)

    def warnings(self) -> list[str]:
        """What is tolerated and perhaps not meant, one sentence each; for the log of rank 0."""
        adapters, duration = self.lora.enable and not self.full_finetuning, self.duration_sec
        steps, chunk = duration * STEPS_PER_SECOND, self.ttt.chunk_size
        tolerated = {
            "save_adapters=True: there are no adapters in full fine-tuning; the whole model is saved.": (
                self.save_adapters and self.full_finetuning
            ),
            "save_adapters=False: adapters are merged into the base model at every checkpoint, in memory.": (
                adapters and not self.save_adapters
            ),
            "lora.ft_embed=True: has no effect without lora.enable.": self.lora.ft_embed and not self.lora.enable,
            f"ttt.chunk_size={chunk} of {steps:g} steps (duration_sec={duration:g}): less than half of a sequence is "
            "read with an updated weight; lower the one or raise the other.": self.ttt.enabled and steps < 2 * chunk,
            "param_dtype='float16': no loss scaling is done and gradients may underflow; bfloat16 is safer.": (
                self.param_dtype == "float16"
            ),
        }
        return [message for message, holds in tolerated.items() if holds]


def load_args(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> TrainArgs:
    """Reads a YAML file, with dotted overrides such as `["--optim.lr", "1e-5", "--do_eval", "--ttt.layers=1,3"]`.

    Raises:
        ConfigError: for an unknown key at any depth, a wrong type, or no such file. `validate()` is the caller's.
    """
    content, waiting = read_yaml(Path(path)), list(overrides)
    while waiting:
        token = waiting.pop(0)
        if not token.startswith("--"):
            raise ConfigError(f"{token!r}: not understood; overrides look like `--optim.lr 1e-5`.")
        name, equals, value = token[2:].partition("=")
        if not equals:
            value = waiting.pop(0) if waiting and not waiting[0].startswith("--") else None
        override(TrainArgs, content, name, value)
    return build(TrainArgs, content)


def parse_command_line(argv: list[str]) -> TrainArgs:
    """`FILE` or `--config FILE`, `--resume [STEP]`, and dotted overrides, in any order (without the program's name).

    Raises:
        ConfigError: as `load_args`, or without exactly one FILE.
    """
    files, overrides, waiting = [], [], list(argv)
    while waiting:
        token = waiting.pop(0)
        name, equals, value = token.partition("=")
        if name == "--config":
            if not equals and not waiting:
                raise ConfigError("config: needs a value, as in `--config FILE.yaml`.")
            files.append(value if equals else waiting.pop(0))
        elif name == "--resume":
            if not equals and waiting and re.fullmatch(r"-?\d+", waiting[0]):
                value = waiting.pop(0)
            overrides += ["--checkpoint.resume=true", f"--checkpoint.resume_step={value or -1}"]
        elif token.startswith("--"):
            overrides.append(token)
            if not equals and waiting and not waiting[0].startswith("--"):
                overrides.append(waiting.pop(0))
        else:
            files.append(token)
    if len(files) != 1:
        raise ConfigError(f"config={files!r}: exactly one YAML file is needed, as FILE or as `--config FILE`.")
    return load_args(files[0], overrides)


def to_dict(args: TrainArgs) -> dict[str, Any]:
    """Nested dictionaries for `training_config.json`. The key of Weights & Biases is a secret and left out (null)."""
    content = dataclasses.asdict(args)
    content["wandb"]["key"] = None
    return content


def from_dict(content: dict[str, Any]) -> TrainArgs:
    """The inverse of `to_dict`, as strict as `load_args`."""
    return build(TrainArgs, copy.deepcopy(content))
