"""The other model of a comparison: the control of the run, another checkpoint, or a base model without any training."""

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, loaders

import moshi_patch

from ..checkpoint.folders import list_checkpoints
from ..checkpoint.saved import SavedCheckpoint, load_model, model_paths, open_checkpoint
from ..common.differences import differences
from ..common.errors import ConfigError
from ..common.files import read_json
from ..model.base import find_base_files, refuse_not_finite
from ..settings.evaluation import EvalArgs
from ..settings.parsing import flat
from ..settings.schema import MoshiPaths, TrainArgs
from ..settings.validation import check_moshi_paths
from ..training.control import CONTROL_FOLDER
from .conditions import BASELINE, CONTROL
from .result_store import file_identity

BASE, OWN_CONTROL, NONE = "base", "control", "none"
"""As `baseline`: the base model in `moshi_paths`; the control of the checkpoint's run; no comparison."""

OF_THE_CODES = ("n_q", "dep_q", "card", "text_card", "delays")
"""Settings of the model that make codes, and the loss of each, comparable."""

OF_THE_TRAINING = (
    *("data.train_data", "data.shuffle", "duration_sec", "batch_size", "num_microbatches", "max_steps", "seed"),
    *("optim.lr", "optim.weight_decay", "optim.pct_start", "max_norm", "param_dtype", "full_finetuning"),
    *("lora.enable", "lora.rank", "lora.scaling", "lora.ft_embed", "ttt.first_steps", "ttt.stock_lr"),
    *("text_padding_weight", "first_codebook_weight_multiplier"),
)
"""Settings of a training that a control has as its run: a difference of the two losses is then due to TTT alone."""


@dataclass(frozen=True)
class Baseline:
    """What is to be loaded: a checkpoint over the base model of `paths`, or that base model itself.

    Attributes:
        condition: `CONTROL`, or `BASELINE` for any other model.
        notes: what keeps the comparison from being that of a run and its control; a sentence each.
    """

    checkpoint: SavedCheckpoint | None
    paths: MoshiPaths
    condition: str = BASELINE
    notes: list[str] = field(default_factory=list)

    def identity(self) -> list[Any]:
        """What the results depend on, for a fingerprint."""
        files = [] if self.checkpoint is None else [file_identity(self.checkpoint.weights), self.checkpoint.config]
        if self.checkpoint is None or self.checkpoint.needs_base:
            info = find_base_files(self.paths)
            files += [file_identity(info.moshi_weights), info.lm_config]
        return files


def open_baseline(args: EvalArgs, saved: SavedCheckpoint) -> Baseline | None:
    """Finds `args.baseline`, or without one the control of the run if that was trained; reads no weights.

    Args:
        saved: the checkpoint that it is compared with.

    Returns:
        None when nothing is to be compared.

    Raises:
        ConfigError: when it is neither a checkpoint nor a base model, is damaged, or is about other codes.
    """
    if args.baseline == NONE:
        return None
    if args.baseline is not None:
        return _open(args.baseline, args, saved)
    if not saved.config.get("ttt_enabled") or control_of(saved) is None:
        return None
    with telling_how_to_leave_it_out(args):
        return _open(OWN_CONTROL, args, saved)


def control_of(saved: SavedCheckpoint) -> Path | None:
    """The checkpoint of the run's control at the same step, or else its newest; None without a control."""
    if saved.run_dir is None:
        return None
    there = list_checkpoints(saved.run_dir / CONTROL_FOLDER / "checkpoints")
    return there.get(saved.step, list(there.values())[-1]) if there else None


@contextlib.contextmanager
def telling_how_to_leave_it_out(args: EvalArgs) -> Iterator[None]:
    """Adds to an error over a baseline that nobody asked for how to do without."""
    try:
        yield
    except ConfigError as error:
        if args.baseline is not None:
            raise
        raise ConfigError(f"{error} It is the control of the run; --baseline none leaves it out.") from error


def _open(name: str, args: EvalArgs, saved: SavedCheckpoint) -> Baseline:
    baseline = _find(name, args, saved)
    check_moshi_paths(baseline.paths, weights=baseline.checkpoint is None or baseline.checkpoint.needs_base)
    if baseline.checkpoint is not None:
        config = baseline.checkpoint.config
    else:
        info = find_base_files(baseline.paths, weights=_local(baseline.paths))
        own = saved.weights.resolve()
        if own in [path.resolve() for path in (info.moshi_weights, info.lora_weights) if path is not None]:
            raise ConfigError(
                f"baseline={name!r}: {saved.weights} is the checkpoint itself, which would be compared "
                "with itself; give the folder of the model that it was trained from."
            )
        config = info.lm_config or loaders._lm_kwargs
    differing = differences(config, saved.config, keys=OF_THE_CODES)
    if differing:
        raise ConfigError(f"baseline={name!r}: cannot be compared, its codes differ: {'; '.join(differing)}.")
    return baseline


def load_baseline(baseline: Baseline, device: torch.device, dtype: torch.dtype) -> LMModel:
    """The model in eval mode, TTT as it was trained or none."""
    if baseline.checkpoint is not None:
        return load_model(baseline.checkpoint, baseline.paths, device, dtype)[0]
    moshi_patch.install()
    info = find_base_files(baseline.paths)
    model = info.get_moshi(device=device, dtype=dtype)
    refuse_not_finite(model, str(info.moshi_weights))
    return model


def _local(paths: MoshiPaths) -> bool:
    """Whether its weights are a file of this machine, which costs nothing to find."""
    if paths.moshi_path is not None:
        return not paths.moshi_path.startswith("hf://")
    return paths.hf_repo_id is None or Path(paths.hf_repo_id).is_dir()


def _find(name: str, args: EvalArgs, saved: SavedCheckpoint) -> Baseline:
    if name == BASE:
        return Baseline(None, args.moshi_paths)
    if name == OWN_CONTROL or (saved.run_dir is not None and Path(name).resolve() == saved.run_dir / CONTROL_FOLDER):
        path = control_of(saved)
        if path is None:
            where = saved.folder if saved.run_dir is None else saved.run_dir / CONTROL_FOLDER
            raise ConfigError(
                f"baseline={name!r}: {where} is no control; a run that is trained with control=true has one."
            )
    else:
        path = Path(name)
    try:
        other = open_checkpoint(path, "baseline")
    except ConfigError as error:
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{error} Or the folder of a base model, or {BASE!r} for the one of moshi_paths."
            ) from error
        read_json(path / "config.json")
        return Baseline(None, MoshiPaths(hf_repo_id=str(path)))
    paths = args.moshi_paths if other.training is None else model_paths(other)
    return Baseline(other, paths, *_compared_with(saved, other))


def _compared_with(saved: SavedCheckpoint, other: SavedCheckpoint) -> tuple[str, list[str]]:
    """Which condition `other` is beside `saved`, and what stands in the way of calling it the control."""
    ours, theirs = saved.train_args, other.train_args
    if None in (ours, theirs) or theirs.ttt.enabled or not ours.ttt.enabled:
        return BASELINE, []
    there, here = _settings(theirs), _settings(ours)
    known = [key for key in OF_THE_TRAINING if "" not in (there[key], here[key])]  # an export's
    differing = differences(there, here, keys=known)
    if not (theirs.ttt.as_control or theirs.full_finetuning):
        differing.append("ttt.as_control=False, so that W_down of the TTT layers was not trained in full")
    if differing:
        return BASELINE, [
            f"The baseline was trained without TTT, but is no control of this run: {'; '.join(differing)}."
        ]
    if other.step != saved.step:
        return CONTROL, [
            f"The control is of step {other.step}, the checkpoint of step {saved.step}: what the steps between them "
            "changed counts into the difference."
        ]
    return CONTROL, []


def _settings(args: TrainArgs) -> dict[str, Any]:
    return flat(dataclasses.asdict(args))
