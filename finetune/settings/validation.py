"""What is wrong with the settings of a run, as far as it shows before a model is loaded."""

import importlib.util
import math
import os
import re
from pathlib import Path
from typing import Any

from ..common.errors import ConfigError
from ..common.files import is_file
from .schema import INITIAL_TARGETS, PARAM_DTYPES, STEPS_PER_SECOND, MoshiPaths, TrainArgs
from .sources import parse_sources

OPTIONAL_NUMBERS = ("ttt.optim_lr", "ttt.text_emb_lr", "ttt.stock_lr", "num_ckpt_keep")
"""Positive, or null."""


def validate(args: TrainArgs) -> None:
    """Everything that can be known before a model is loaded; looks at files but opens none.

    Raises:
        ConfigError: a ValueError that names the key, its value and the remedy.
    """
    args.ttt.lm_kwargs()
    _check_numbers(args)
    _check_modes(args)
    _check_duration(args)
    _check_files(args)


def unusual_settings(args: TrainArgs) -> list[str]:
    """What is tolerated and perhaps not meant, one sentence each; for the log of rank 0."""
    adapters, duration = args.lora.enable and not args.full_finetuning, args.duration_sec
    steps, chunk = duration * STEPS_PER_SECOND, args.ttt.chunk_size
    tolerated = {
        "save_adapters=True: there are no adapters in full fine-tuning; the whole model is saved.": (
            args.save_adapters and args.full_finetuning
        ),
        "save_adapters=False: adapters are merged into the base model at every checkpoint, in memory.": (
            adapters and not args.save_adapters
        ),
        "lora.ft_embed=True: has no effect without lora.enable.": args.lora.ft_embed and not args.lora.enable,
        f"ttt.chunk_size={chunk} of {steps:g} steps (duration_sec={duration:g}): less than half of a sequence is "
        "read with an updated weight; lower the one or raise the other.": args.ttt.enabled and steps < 2 * chunk,
        "control=True: without do_eval the two runs are not compared while they train.": (
            args.control and not args.do_eval
        ),
        "param_dtype='float16': no loss scaling is done and gradients may underflow; bfloat16 is safer.": (
            args.param_dtype == "float16"
        ),
    }
    return [message for message, holds in tolerated.items() if holds]


def check_moshi_paths(paths: MoshiPaths, *, weights: bool = True) -> None:
    """That local files are there.

    Args:
        weights: False: nobody will read those of the language model.

    Raises:
        ConfigError: naming the key.
    """

    def require(holds: bool, name: str, remedy: str) -> None:
        if not holds:
            raise ConfigError(f"moshi_paths.{name}={getattr(paths, name)!r}: {remedy}")

    names = ("mimi_path", "moshi_path", "tokenizer_path", "config_path")
    for name in names if weights else [name for name in names if name != "moshi_path"]:
        path = getattr(paths, name)
        known = path is not None or paths.hf_repo_id is not None
        require(known, name, "is required while moshi_paths.hf_repo_id is null.")
        local = path is not None and not path.startswith("hf://")
        exists = not local or is_file(Path(path.removeprefix("file://")))
        require(exists, name, "no such file; correct the path, or null for the repository's.")
    repo = paths.hf_repo_id
    known = repo is None or os.path.isdir(repo) or re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo) is not None
    require(known, "hf_repo_id", "must be OWNER/NAME on the Hub, or a folder that exists.")


def _require(holds: bool, args: TrainArgs, name: str, remedy: str) -> None:
    if not holds:
        value: Any = args
        for part in name.split("."):
            value = getattr(value, part)
        raise ConfigError(f"{name}={value!r}: {remedy}")


def _check_numbers(args: TrainArgs) -> None:
    positive = "duration_sec batch_size num_microbatches max_steps max_norm log_freq first_codebook_weight_multiplier"
    adapters = ["lora.rank", "lora.scaling"] if args.lora.enable else []
    for name in [*positive.split(), *adapters, "optim.lr", *OPTIONAL_NUMBERS]:
        owner = getattr(args, name.split(".")[0]) if "." in name else args
        value = getattr(owner, name.split(".")[-1])
        optional = name in OPTIONAL_NUMBERS
        allowed = value is None if optional else False
        remedy = f"must be a positive finite number{', or null' * optional}."
        _require(allowed or (math.isfinite(value) and value > 0), args, name, remedy)
    for name, value in (
        ("text_padding_weight", args.text_padding_weight),
        ("optim.weight_decay", args.optim.weight_decay),
    ):
        _require(math.isfinite(value) and value >= 0, args, name, "must be a finite number that is not negative.")
    _require(args.sample_freq >= 0, args, "sample_freq", "must be a whole number that is not negative; 0: no samples.")
    _require(args.ttt.first_steps >= 0, args, "ttt.first_steps", "must be a whole number that is not negative.")
    # torch takes 64 bits, and each rank adds its number.
    _require(0 <= args.seed < 2**63, args, "seed", "must be a whole number, not negative and below 2**63.")
    _require(args.checkpoint.resume_step >= -1, args, "checkpoint.resume_step", "must be a step, or -1 for the newest.")
    # OneCycleLR divides by what is left of the steps after the warm-up, and by pct_start * total_steps - 1.
    _require(0 <= args.optim.pct_start < 1, args, "optim.pct_start", "must be at least 0 and less than 1.")
    divides = args.optim.pct_start * args.max_steps != 1
    remedy = f"a warm-up of exactly 1 of max_steps={args.max_steps} steps breaks OneCycleLR; change either a little."
    _require(divides, args, "optim.pct_start", remedy)
    _require(args.param_dtype in PARAM_DTYPES, args, "param_dtype", f"must be one of {', '.join(PARAM_DTYPES)}.")


def _check_modes(args: TrainArgs) -> None:
    contradiction = args.full_finetuning and args.lora.enable
    _require(not contradiction, args, "full_finetuning", "contradicts lora.enable=True; set one of the two to false.")
    trains_w_down = args.ttt.as_control and args.ttt.train_w_down
    trains = args.full_finetuning or args.lora.enable or args.ttt.enabled or trains_w_down
    remedy = "nothing would be trained; set one of full_finetuning, lora.enable and ttt.enabled to true."
    _require(trains, args, "full_finetuning", remedy)
    remedy = f"must be one of {', '.join(INITIAL_TARGETS)}."
    _require(args.ttt.init_target in INITIAL_TARGETS, args, "ttt.init_target", remedy)
    both = args.ttt.enabled and args.ttt.as_control
    _require(not both, args, "ttt.as_control", "contradicts ttt.enabled=True; a control is trained without TTT.")
    alone = args.control and not args.ttt.enabled
    _require(not alone, args, "control", "there is nothing to control, as ttt.enabled is false; set it to false.")
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
    found = args.init_from is None or os.path.exists(args.init_from)
    _require(found, args, "init_from", "no such file or folder; give the checkpoint of a finished run, or null.")
