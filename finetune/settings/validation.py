"""What is wrong with the settings of a run, as far as it shows before a model is loaded."""

import importlib.util
import os

from moshi_patch import wrong_file, wrong_repository

from .limits import check_limits, require
from .modes import check_mode, mode_of, saves_trained_alone
from .schema import STEPS_PER_SECOND, MoshiPaths, OptimArgs, TrainArgs
from .sources import check_sources

NOT_WEIGHTS = ("mimi_path", "tokenizer_path", "config_path")
"""Files of a base model beside the weights of its language model."""


def validate(args: TrainArgs) -> None:
    """Everything that can be known before a model is loaded; looks at files but opens none.

    Raises:
        ConfigError: a ValueError that names the key, its value and the remedy.
    """
    check_limits(args)
    if args.training_mode != "frozen":
        _check_schedule(args.optim, args.max_steps)
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
        "save_adapters=True: the whole model is saved with training_mode=auto, though TTT alone trains; set "
        "training_mode to ttt to save what trains alone, or save_adapters to false.": (
            mode_of(args) == "ttt" and args.save_adapters and not saves_trained_alone(args) and not args.ttt.as_control
        ),
        "training_mode='frozen': without do_eval the training data alone are measured.": (
            args.training_mode == "frozen" and not args.do_eval
        ),
        "lora.ft_embed=True: has no effect without lora.enable.": args.lora.ft_embed and not args.lora.enable,
        f"ttt.chunk_size={chunk} of {steps:g} steps (duration_sec={duration:g}): less than half of a sequence is "
        "read with an updated weight; lower the one or raise the other.": _has_chunks(args) and steps < 2 * chunk,
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
    for name in (*NOT_WEIGHTS, "moshi_path") if weights else NOT_WEIGHTS:
        path, key = getattr(paths, name), f"moshi_paths.{name}"
        known = path is not None or paths.hf_repo_id is not None
        require(known, key, path, "is required while moshi_paths.hf_repo_id is null.")
        problem = None if path is None else wrong_file(path)
        require(problem is None, key, path, f"{problem}; correct the path, or null for the repository's.")
    if paths.hf_repo_id is not None:
        problem = wrong_repository(paths.hf_repo_id)
        require(problem is None, "moshi_paths.hf_repo_id", paths.hf_repo_id, f"{problem}.")


def _check_schedule(optim: OptimArgs, max_steps: int) -> None:
    """OneCycleLR divides by what is left of the steps after the warm-up, and by pct_start * max_steps - 1."""
    remedy = f"a warm-up of exactly 1 of max_steps={max_steps} steps breaks OneCycleLR; change either a little."
    require(optim.pct_start * max_steps != 1, "optim.pct_start", optim.pct_start, remedy)


def _check_modes(args: TrainArgs) -> None:
    check_mode(args)
    full, project = args.full_finetuning, args.wandb.project
    remedy = "contradicts lora.enable=True; set one of the two to false."
    require(not (full and args.lora.enable), "full_finetuning", full, remedy)
    remedy = "nothing would be trained; set one of full_finetuning, lora.enable and ttt.enabled to true."
    w_down = args.ttt.as_control and args.ttt.train_w_down and args.ttt.kind == "in_place"
    trains = full or args.lora.enable or args.ttt.enabled or w_down or args.training_mode == "frozen"
    require(trains, "full_finetuning", full, remedy)
    remedy = "contradicts ttt.enabled=True; a control is trained without TTT."
    require(not (args.ttt.enabled and args.ttt.as_control), "ttt.as_control", True, remedy)
    remedy = "there is nothing to control, as ttt.enabled is false; set it to false."
    require(args.ttt.enabled or not args.control, "control", True, remedy)
    require(project != "", "wandb.project", project, "must not be empty; null turns Weights & Biases off.")
    installed = project is None or importlib.util.find_spec("wandb") is not None
    remedy = "wandb is not installed; `pip install wandb`, or set it to null."
    require(installed, "wandb.project", project, remedy)


def _check_duration(args: TrainArgs) -> None:
    steps, chunk = args.duration_sec * STEPS_PER_SECOND, args.ttt.chunk_size
    remedy = (
        f"is {steps:g} steps, no more than ttt.chunk_size={chunk}: the target generators would get no gradient. "
        f"Raise duration_sec above {chunk / STEPS_PER_SECOND:g}, or lower ttt.chunk_size below {steps:g}."
    )
    require(not _has_chunks(args) or steps > chunk, "duration_sec", args.duration_sec, remedy)


def _has_chunks(args: TrainArgs) -> bool:
    """Whether updates are made chunk by chunk; those of a mini-batch (`ttt.kind: mlp`) are read at once."""
    return args.ttt.enabled and args.ttt.kind == "in_place"


def _check_files(args: TrainArgs) -> None:
    remedy = "is required; the folder for checkpoints and logs."
    require(bool(args.run_dir.strip()), "run_dir", args.run_dir, remedy)
    for name in ("train_data", "eval_data") if args.do_eval else ("train_data",):
        check_sources(f"data.{name}", getattr(args.data, name), " (or do_eval=false)" * (name == "eval_data"))
    check_moshi_paths(args.moshi_paths)
    found = args.init_from is None or os.path.exists(args.init_from)
    require(found, "init_from", args.init_from, "no such file or folder; give the checkpoint of a run, or null.")
