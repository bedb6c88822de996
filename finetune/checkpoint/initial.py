"""`init_from`: the weights of a saved checkpoint as the beginning of a new run."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import moshi_patch
from moshi_patch import stock_name

from ..common.differences import differences
from ..common.distributed import Context, on_rank_0
from ..common.errors import ConfigError
from ..model.adapters import lora_layers, lora_parameters
from .saved import SavedCheckpoint, base_remedy, open_checkpoint
from .verify import refuse_broken
from .weights import renamed, ttt_tensors

logger = logging.getLogger(__name__)


def load_initial_weights(path: str | Path, model: nn.Module, ctx: Context) -> None:
    """`init_from`: the weights of a finished run as the beginning of a new one. Collective; rank 0 reads.

    Adapters go into a model with adapters of the same rank, over the same base model. A merged model goes into a model
    without adapters, or becomes the base of a model with new ones. What trained alone goes into a model over its base.

    Args:
        path: a run's folder (its newest checkpoint), a checkpoint's, its `consolidated` or the file in that.
        model: built and loaded on rank 0, and not yet wrapped; other ranks' copies are not touched.

    Raises:
        ValueError: when there is no finished checkpoint in `path`, or its weights do not fit; nothing is changed then.
    """
    on_rank_0(ctx, lambda: _load_initial(Path(path), model))


def _load_initial(path: Path, model: nn.Module) -> None:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise RuntimeError("init_from is loaded before the model is wrapped.")
    saved = open_checkpoint(path, "init_from")
    refuse_broken(saved, "init_from")
    config, layers, weights = saved.config, lora_layers(model), load_file(saved.weights)
    if saved.adapters and not layers:
        raise ConfigError(
            f"init_from={str(path)!r}: holds adapters, and lora.enable is false. Set lora.enable: true with "
            f"lora.rank: {config.get('lora_rank')}, or give a checkpoint saved with save_adapters: false."
        )
    inside, own = renamed(layers), model.state_dict()
    values = {inside.get(name, name): value for name, value in weights.items()}
    _check_fit(path, model, values, own, saved)
    _check_base(path, saved, own, values.keys(), lora_parameters(model).keys(), inside)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    added_by_ttt = ttt_tensors(saved.weights, model)
    logger.info("init_from: %d tensors of %s, %s", len(values), saved.weights, added_by_ttt)
    if not saved.needs_base and layers:
        logger.warning("init_from: the adapters of this run fit the base model %s; serve them with it.", saved.weights)
    _warn_of_other_ttt(model, config)


def _check_fit(
    path: Path, model: nn.Module, values: dict[str, torch.Tensor], own: dict[str, torch.Tensor], saved: SavedCheckpoint
) -> None:
    """Raises a ConfigError when `values`, of `saved`, are not the weights of `model`, named as in it."""
    targets = {stock_name(name) for name in moshi_patch.ttt_parameters(model)}
    added = lora_parameters(model).keys()
    wanted = added if saved.adapters else targets if saved.trained_alone else own.keys() - added - targets
    present = targets & values.keys()
    problems = {
        "missing": (wanted - values.keys()) | (targets - present if present else set()),
        "not in this model": values.keys() - own.keys(),
        "of another shape": {n for n in values.keys() & own.keys() if values[n].shape != own[n].shape},
        "not loaded yet": {n for n in own if own[n].is_meta},
    }
    found = [f"{len(names)} {what}, such as {min(names)}" for what, names in problems.items() if names]
    if found:
        there = {key: value for key, value in saved.config.items() if key.startswith(("lora", "ttt_"))}
        raise ConfigError(f"init_from={str(path)!r}: does not fit: {'; '.join(found)}. Its settings: {there}.")


def _check_base(
    path: Path,
    saved: SavedCheckpoint,
    own: dict[str, torch.Tensor],
    held: Collection[str],
    added: Collection[str],
    inside: dict[str, str],
) -> None:
    """Raises a ConfigError when `own`, the weights of a loaded model, are not of the base of what trained alone.

    Args:
        held: the names of what trained; `added`: of adapters, which no base has.
        inside: keys in the base -> in the model.
    """
    if saved.base_fingerprint is None:
        return
    outside = {name: key for key, name in inside.items()}
    rest = {outside.get(name, name): value for name, value in own.items() if name not in {*held, *added}}
    what = f"init_from={str(path)!r}: the base model of this run"
    saved.base_fingerprint.refuse_other(rest, what, base_remedy(saved))


def _warn_of_other_ttt(model: nn.Module, config: dict[str, Any]) -> None:
    here = model.ttt_config.to_kwargs() if moshi_patch.ttt_memories(model) else {}
    for text in differences(here, config, "{key} is {one!r}, was {other!r} in that run.", here.keys() & config.keys()):
        logger.warning("init_from: %s", text)
