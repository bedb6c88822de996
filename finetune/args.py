"""All settings of a training run: moshi-finetune's YAML keys and defaults, plus `ttt:`, `checkpoint:`, `init_from`."""

import copy
import dataclasses
import importlib.util
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .data.manifest import parse_sources
from .parsing import ConfigError, build, override, read_yaml
from .sections import (
    CheckpointArgs,
    DataArgs,
    LoraArgs,
    MoshiPaths,
    OptimArgs,
    TTTArgs,
    WandbArgs,
    check_moshi_paths,
)

STEPS_PER_SECOND = 12.5
"""Mimi's frame rate: one step of the language model is 80 ms."""

PARAM_DTYPES = ("bfloat16", "float32", "float16")


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
        self.ttt.lm_kwargs()
        _check_numbers(self)
        _check_modes(self)
        _check_duration(self)
        _check_files(self)

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


def _require(holds: bool, args: TrainArgs, name: str, remedy: str) -> None:
    if not holds:
        value: Any = args
        for part in name.split("."):
            value = getattr(value, part)
        raise ConfigError(f"{name}={value!r}: {remedy}")


def _check_numbers(args: TrainArgs) -> None:
    positive = "duration_sec batch_size num_microbatches max_steps max_norm log_freq first_codebook_weight_multiplier"
    adapters = ["lora.rank", "lora.scaling"] if args.lora.enable else []
    for name in [*positive.split(), *adapters, "optim.lr", "ttt.optim_lr", "num_ckpt_keep"]:
        owner = getattr(args, name.split(".")[0]) if "." in name else args
        value = getattr(owner, name.split(".")[-1])
        optional = name in ("ttt.optim_lr", "num_ckpt_keep")
        allowed = value is None if optional else False
        remedy = f"must be a positive finite number{', or null' * optional}."
        _require(allowed or (math.isfinite(value) and value > 0), args, name, remedy)
    for name, value in (
        ("text_padding_weight", args.text_padding_weight),
        ("optim.weight_decay", args.optim.weight_decay),
    ):
        _require(math.isfinite(value) and value >= 0, args, name, "must be a finite number that is not negative.")
    _require(args.seed >= 0, args, "seed", "must be a whole number that is not negative.")
    _require(args.checkpoint.resume_step >= -1, args, "checkpoint.resume_step", "must be a step, or -1 for the newest.")
    _require(0 <= args.optim.pct_start <= 1, args, "optim.pct_start", "must lie between 0 and 1.")
    # OneCycleLR divides by pct_start * total_steps - 1.
    divides = args.optim.pct_start * args.max_steps != 1
    remedy = f"a warm-up of exactly 1 of max_steps={args.max_steps} steps breaks OneCycleLR; change either a little."
    _require(divides, args, "optim.pct_start", remedy)
    _require(args.param_dtype in PARAM_DTYPES, args, "param_dtype", f"must be one of {', '.join(PARAM_DTYPES)}.")


def _check_modes(args: TrainArgs) -> None:
    contradiction = args.full_finetuning and args.lora.enable
    _require(not contradiction, args, "full_finetuning", "contradicts lora.enable=True; set one of the two to false.")
    trains = args.full_finetuning or args.lora.enable or args.ttt.enabled
    remedy = "nothing would be trained; set one of full_finetuning, lora.enable and ttt.enabled to true."
    _require(trains, args, "full_finetuning", remedy)
    project = args.wandb.project
    _require(project != "", args, "wandb.project", "must not be empty; null turns Weights & Biases off.")
    installed = project is None or importlib.util.find_spec("wandb") is not None
    _require(installed, args, "wandb.project", "wandb is not installed; `pip install wandb`, or set it to null.")


def _check_duration(args: TrainArgs) -> None:
    steps, chunk = args.duration_sec * STEPS_PER_SECOND, args.ttt.chunk_size
    remedy = (
        f"is {steps:g} steps, no more than ttt.chunk_size={chunk}: the target generators would get no gradient. "
        f"Raise duration_sec above {chunk / STEPS_PER_SECOND:g}, or lower ttt.chunk_size below {steps:g}."
    )
    _require(not args.ttt.enabled or steps > chunk, args, "duration_sec", remedy)


def _check_files(args: TrainArgs) -> None:
    _require(bool(args.run_dir.strip()), args, "run_dir", "is required; the folder for checkpoints and logs.")
    for name in ("train_data", "eval_data") if args.do_eval else ("train_data",):
        spec = getattr(args.data, name)
        remedy = "is required; a .jsonl file or a folder of them" + (
            " (or do_eval=false)." * (name == "eval_data") or "."
        )
        _require(bool(spec.strip()), args, f"data.{name}", remedy)
        try:
            parse_sources(spec)
        except ValueError as error:
            raise ConfigError(f"data.{name}={spec!r}: {error}") from error
    check_moshi_paths(args.moshi_paths)
    found = args.init_from is None or Path(args.init_from).exists()
    _require(found, args, "init_from", "no such file or folder; give the checkpoint of a finished run, or null.")
