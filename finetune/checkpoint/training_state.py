"""Saves and restores what exact resume needs and a served model does not, with `torch.distributed.checkpoint`.

Saved are the parameters that train, adapters and target generators, the optimizer, and the progress: step, scheduler,
place in the data, random numbers of each rank. The other weights are the base model's. They are not saved again, only
a checksum of each, so that a run never continues on other ones. The number of ranks may change.
"""

import contextlib
import json
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import moshi_patch
from moshi_patch import stock_name

from ..common.distributed import Context, on_rank_0
from ..common.errors import ConfigError, in_one_line
from ..data.loader import TrainLoader
from ..model.adapters import lora_parameters
from .base_fingerprint import bit_sums
from .folders import step_of
from .restricted import RestrictedPlanner, RestrictedReader
from .state_files import INDEX

CHANGED_BY_STEPS = frozenset({"lr", "betas", "params"})
"""Keys of an optimizer's group that change from step to step; the others are settings."""


@dataclass
class TrainState:
    """A run between two steps. The model is wrapped in FSDP with `use_orig_params=True`, or plain on one process.

    Args:
        step: optimizer steps done.
        optimizer, scheduler: None where nothing trains; such a run is never saved.
    """

    step: int
    model: nn.Module
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    loader: TrainLoader


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the dozens of deprecations that torch's own checkpointing of FSDP warns itself of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield


@torch.no_grad()
def save_training_state(folder: Path, state: TrainState, ctx: Context) -> dict[str, int]:
    """Writes `folder`, each rank its shards. Collective; every file is on the disk when it returns.

    Returns:
        The sum of each weight that is the base model's.
    """
    with quiet():
        weights = get_model_state_dict(state.model)
        own = _not_of_the_base(state.model)
        progress = {
            "step": state.step,
            "scheduler": state.scheduler.state_dict(),
            "loader": state.loader.state_dict(),
            "base": bit_sums({name: value for name, value in weights.items() if name not in own}, ctx),
        }
        content = {
            "model": {name: weights[name] for name in own},
            "optimizer": get_optimizer_state_dict(state.model, state.optimizer),
            "progress": json.dumps(progress),
            "rng": {str(ctx.rank): _random_state(ctx)},
        }
        dcp.save(content, checkpoint_id=folder, no_dist=ctx.world_size == 1)
    return progress["base"]


@torch.no_grad()
def load_training_state(folder: Path, state: TrainState, ctx: Context, *, keep_schedule: bool = True) -> None:
    """Puts `state` where it was when `folder` was written, on any number of ranks. Collective.

    Args:
        keep_schedule: False: learning rates, weight decay and number of steps stay those that `state` was built with;
            only the place in the schedule is taken from the checkpoint.

    Raises:
        ConfigError: before anything is changed, when other parameters train, or the frozen ones hold other values; at
            any time, when a file is damaged or gone.
    """
    with quiet():
        saved = on_rank_0(ctx, lambda: _read_metadata(folder))
        content: dict[str, Any] = {"progress": ""}
        _read(folder, content, ctx)
        progress = _parse_progress(folder, content["progress"], state.scheduler)

        weights = get_model_state_dict(state.model)
        own = _not_of_the_base(state.model)
        _check_own(folder, {name: weights[name] for name in own}, saved)
        base = bit_sums({name: value for name, value in weights.items() if name not in own}, ctx)
        _check_base(folder, base, progress["base"])
        _check_schedule(state.scheduler, progress["scheduler"], keep_schedule)
        _restore_place(folder, state.loader, progress["loader"])

        settings = [
            {key: value for key, value in g.items() if key not in CHANGED_BY_STEPS}
            for g in state.optimizer.param_groups
        ]
        content = {"model": {name: weights[name] for name in own}, "rng": {}}
        if f"rng.{ctx.rank}.torch" in saved:  # not when there were fewer ranks
            here = _random_state(ctx)
            content["rng"] = {str(ctx.rank): {key: here[key] for key in here if f"rng.{ctx.rank}.{key}" in saved}}
        _load_with_optimizer(folder, state, ctx, content, saved)
        set_model_state_dict(state.model, weights | content["model"])
    if keep_schedule:
        state.scheduler.load_state_dict(progress["scheduler"])
    else:
        _continue_schedule(state, settings, progress["scheduler"]["last_epoch"])
    state.step = progress["step"]
    for random_state in content["rng"].values():
        try:
            _set_random_state(random_state, ctx)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(folder, error) from error


def _load_with_optimizer(
    folder: Path, state: TrainState, ctx: Context, content: dict[str, Any], saved: dict[str, Any]
) -> None:
    """Loads `content` in place, and the optimizer. Parameters that never had a gradient have no state; none is made."""
    prefix = "optimizer.state."
    known = {name.removeprefix(prefix).rpartition(".")[0] for name in saved if name.startswith(prefix)}
    optimizer = get_optimizer_state_dict(state.model, state.optimizer)  # of every parameter: torch makes a blank step
    moments = {name: value for name, value in optimizer["state"].items() if name in known}
    content["optimizer"] = optimizer | {"state": moments}
    _read(folder, content, ctx)
    loaded = content["optimizer"]
    set_optimizer_state_dict(
        state.model, state.optimizer, optim_state_dict=loaded | {"state": optimizer["state"] | loaded["state"]}
    )
    for name, parameter in state.model.named_parameters():
        if stock_name(name) not in known:
            state.optimizer.state.pop(parameter, None)


def _read(folder: Path, content: dict[str, Any], ctx: Context) -> None:
    """Fills `content` in place. Collective.

    Nothing is nested in shards here, and looking for it would drop tensors of which this rank has no part (those of a
    first dimension of 1); torch 2.9 then takes the checkpoint for one of another version, and finds keys missing.
    """
    reader, planner = RestrictedReader(folder), RestrictedPlanner(flatten_sharded_tensors=False)
    try:
        dcp.load(content, storage_reader=reader, planner=planner, no_dist=ctx.world_size == 1)
    except CheckpointException as error:  # on every rank, with the failures of all
        reason, _ = next(iter(error.failures.values()))
        raise _damaged(folder, reason) from reason


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        return RestrictedReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a broken pickle may raise anything
        raise _damaged(folder / INDEX, error) from error


def _parse_progress(folder: Path, text: Any, scheduler: LRScheduler) -> dict[str, Any]:
    """Step, scheduler, place in the data and checksums of the base; of the step that the folder's name says."""
    try:
        content = moshi_patch.parse_object(text)
        place = content["scheduler"]
        fit = isinstance(content["step"], int) and isinstance(content["loader"], dict)
        fit = fit and isinstance(content["base"], dict) and isinstance(place["last_epoch"], int)
        if not fit:
            raise ValueError("a value of another kind than was saved")
        content["scheduler"] = {key: place[key] for key in scheduler.state_dict() if key in place}
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from error
    named = step_of(folder.parent)
    if named not in (None, content["step"]):
        raise ConfigError(
            f"{folder}: is of step {content['step']}, and lies in the checkpoint of step {named}. Resume another "
            "step with --resume STEP, or begin a new run from its weights with init_from."
        )
    return content


def _restore_place(folder: Path, loader: TrainLoader, place: dict[str, Any]) -> None:
    try:
        loader.load_state_dict(place)
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(path: Path, error: BaseException) -> ConfigError:
    return ConfigError(
        f"{path}: damaged or incomplete, and cannot be resumed ({type(error).__name__}: {in_one_line(error)}). Resume "
        "another step with --resume STEP, or begin a new run from its weights with init_from."
    )


def _not_of_the_base(model: nn.Module) -> list[str]:
    """Names of what a base model does not give back: what trains, adapters and target generators."""
    added = {*moshi_patch.ttt_parameters(model).values(), *lora_parameters(model).values()}
    return [stock_name(name) for name, p in model.named_parameters() if p.requires_grad or p in added]


def _check_own(folder: Path, own: dict[str, Any], saved: dict[str, Any]) -> None:
    here = {name: tuple(tensor.size()) for name, tensor in own.items()}
    there = {name.removeprefix("model."): tuple(m.size) for name, m in saved.items() if _is_tensor_of_model(name, m)}
    if here != there:
        differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        raise ConfigError(
            f"{folder.parent}: other parameters were trained there, or of another shape: {len(differing)} differ, such "
            f"as {', '.join(differing[:3])}. Restore the settings, or start a new run with init_from."
        )


def _is_tensor_of_model(name: str, described: Any) -> bool:
    return name.startswith("model.") and isinstance(described, TensorStorageMetadata)


def _check_base(folder: Path, here: dict[str, int], there: dict[str, int]) -> None:
    differing = [name for name in there if here.get(name) != there[name]]
    if differing:
        raise ConfigError(
            f"{folder.parent}: {len(differing)} weights of the base model are not those it was trained on, such as "
            f"{', '.join(differing[:3])}. Restore moshi_paths and init_from as they were."
        )


def _check_schedule(scheduler: LRScheduler, there: dict[str, Any], keep: bool) -> None:
    total = getattr(scheduler, "total_steps", None)
    if not keep and total is not None and there["last_epoch"] > total:
        raise ConfigError(f"max_steps={total}: the checkpoint has already done {there['last_epoch']} steps; raise it.")


def _continue_schedule(state: TrainState, settings: list[dict[str, Any]], last_epoch: int) -> None:
    """The schedule as it was built anew, at step `last_epoch`, with the groups' own settings."""
    for group, own in zip(state.optimizer.param_groups, settings, strict=True):
        group.update(own)
    state.scheduler.last_epoch, state.scheduler._step_count = last_epoch, last_epoch + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is called outside of `step`
        rates = state.scheduler.get_lr()  # in closed form: OneCycleLR, LambdaLR
    for group, rate in zip(state.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    state.scheduler._last_lr = list(rates)


def _random_state(ctx: Context) -> dict[str, Any]:
    content = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002
    if ctx.device.type == "cuda":
        content["cuda"] = torch.cuda.get_rng_state(ctx.device)
    return content


def _set_random_state(content: dict[str, Any], ctx: Context) -> None:
    random.setstate(content["python"])
    np.random.set_state(content["numpy"])  # noqa: NPY002
    torch.set_rng_state(content["torch"])
    if "cuda" in content:
        torch.cuda.set_rng_state(content["cuda"], ctx.device)
