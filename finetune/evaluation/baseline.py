"""The other model of a comparison: another checkpoint, or a base model without any training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, loaders

import moshi_patch

from ..checkpoint.saved import SavedCheckpoint, load_model, model_paths, open_checkpoint
from ..common.differences import differences
from ..common.errors import ConfigError
from ..common.files import read_json
from ..model.base import find_base_files, refuse_not_finite
from ..settings.evaluation import EvalArgs
from ..settings.schema import MoshiPaths
from ..settings.validation import check_moshi_paths
from .result_store import file_identity

BASE = "base"
"""As `baseline`: the base model in `moshi_paths`."""

OF_THE_CODES = ("n_q", "dep_q", "card", "text_card", "delays")
"""Settings of the model that make codes, and the loss of each, comparable."""


@dataclass(frozen=True)
class Baseline:
    """What is to be loaded: a checkpoint over the base model of `paths`, or that base model itself."""

    checkpoint: SavedCheckpoint | None
    paths: MoshiPaths

    def identity(self) -> list[Any]:
        """What the results depend on, for a fingerprint."""
        files = [] if self.checkpoint is None else [file_identity(self.checkpoint.weights), self.checkpoint.config]
        if self.checkpoint is None or self.checkpoint.adapters:
            info = find_base_files(self.paths)
            files += [file_identity(info.moshi_weights), info.lm_config]
        return files


def open_baseline(args: EvalArgs, saved: SavedCheckpoint) -> Baseline:
    """Finds `args.baseline`; reads no weights.

    Args:
        saved: the checkpoint that it is compared with.

    Raises:
        ConfigError: when it is neither a checkpoint nor a base model, is damaged, or is about other codes.
    """
    baseline = _find(args)
    check_moshi_paths(baseline.paths, weights=baseline.checkpoint is None or baseline.checkpoint.adapters)
    if baseline.checkpoint is not None:
        config = baseline.checkpoint.config
    else:
        info = find_base_files(baseline.paths, weights=_local(baseline.paths))
        own = saved.weights.resolve()
        if own in [path.resolve() for path in (info.moshi_weights, info.lora_weights) if path is not None]:
            raise ConfigError(
                f"baseline={args.baseline!r}: {saved.weights} is the checkpoint itself, which would be compared "
                "with itself; give the folder of the model that it was trained from."
            )
        config = info.lm_config or loaders._lm_kwargs
    differing = differences(config, saved.config, keys=OF_THE_CODES)
    if differing:
        raise ConfigError(f"baseline={args.baseline!r}: cannot be compared, its codes differ: {'; '.join(differing)}.")
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


def _find(args: EvalArgs) -> Baseline:
    if args.baseline == BASE:
        return Baseline(None, args.moshi_paths)
    path = Path(args.baseline)
    try:
        saved = open_checkpoint(path, "baseline")
    except ConfigError as error:
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{error} Or the folder of a base model, or {BASE!r} for the one of moshi_paths."
            ) from error
        read_json(path / "config.json")
        return Baseline(None, MoshiPaths(hf_repo_id=str(path)))
    return Baseline(saved, args.moshi_paths if saved.training is None else model_paths(saved))
