"""The weights that are served: adapters or the whole model in one safetensors file, with the keys of stock moshi."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from moshi.modules.lora import LoRALinear
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel

import moshi_patch
from moshi_patch import stock_name

from ..common.distributed import Context, on_rank_0
from ..common.errors import ConfigError, in_one_line
from ..common.files import read_json, write_json
from ..model.adapters import lora_layers, lora_parameters
from .training_state import quiet

logger = logging.getLogger(__name__)

ADAPTERS, MERGED = "lora.safetensors", "consolidated.safetensors"
CHECKPOINT_NAME = re.compile(r"checkpoint_(\d{6,})")
"""The name of a complete checkpoint in `RUN_DIR/checkpoints`."""


@torch.no_grad()
def collect_weights(
    model: nn.Module, ctx: Context, *, adapters: bool, dtype: torch.dtype
) -> dict[str, torch.Tensor] | None:
    """What the file holds, on rank 0 and, with CUDA, on the CPU; None on the others. Collective.

    Needs the memory of the whole model on rank 0, whatever is taken of it.

    Args:
        adapters: only what training with adapters changes: the adapters of all linear layers, target generators, the
            full W_down of TTT layers, and all else that is trainable. Otherwise everything, adapters merged.
        dtype: of what is saved; conditioners stay as they are, in float32, as moshi loads them.
    """
    # FSDP frees what it "offloads" from one CPU tensor to the same
    options = StateDictOptions(full_state_dict=True, cpu_offload=ctx.device.type == "cuda")
    with quiet():
        state = get_model_state_dict(model, options=options)
    if ctx.rank:
        return None
    layers = lora_layers(model)
    if adapters:
        chosen = _adapter_names(model, layers)
        state = {name: value for name, value in state.items() if name in chosen}
    else:
        _merge(state, layers)
    to_file = {inside: name for name, inside in _renamed(layers).items()}
    return {to_file.get(name, name): _cast(name, value, dtype) for name, value in state.items()}


def saved_tensors(model: nn.Module, *, adapters: bool) -> dict[str, torch.Tensor]:
    """What :func:`collect_weights` would save of `model`, by the keys of the file; nothing is copied, cast or merged.

    Args:
        model: not wrapped; may be on the meta device.
        adapters: what training with adapters changes. Otherwise all that is no adapter.
    """
    layers, state = lora_layers(model), model.state_dict()
    chosen = _adapter_names(model, layers) if adapters else state.keys() - lora_parameters(model).keys()
    to_file = {inside: name for name, inside in _renamed(layers).items()}
    return {to_file.get(name, name): value for name, value in state.items() if name in chosen}


def load_initial_weights(path: str | Path, model: nn.Module, ctx: Context) -> None:
    """`init_from`: the weights of a finished run as the beginning of a new one. Collective; rank 0 reads.

    Adapters go into a model with adapters of the same rank, over the same base model. A merged model goes into a model
    without adapters, or becomes the base of a model with new ones.

    Args:
        path: a run's folder (its newest checkpoint), a checkpoint's, its `consolidated` or the file in that.
        model: built and loaded on rank 0, and not yet wrapped; other ranks' copies are not touched.

    Raises:
        ValueError: when there is no finished checkpoint in `path`, or its weights do not fit; nothing is changed then.
    """
    on_rank_0(ctx, lambda: _load_initial(Path(path), model))


def relocate_adapters(folder: Path) -> None:
    """After checkpoints moved to somewhere in `folder`: their configs name the adapters where they are now.

    A config that cannot be read stays as it is, with a warning.
    """
    for path in folder.rglob("consolidated/config.json"):
        adapters = path.with_name(ADAPTERS)
        try:
            config = read_json(path)
        except ConfigError as error:
            logger.warning("%s It was damaged before it was moved.", error)
            continue
        if "lora_name" in config and adapters.is_file():
            write_json(path, config | {"lora_name": f"file://{adapters.resolve()}"})


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in `RUN_DIR/checkpoints` by step, ascending; whole, but not all can be resumed.

    Their names say that they were written to the end. To be served, or the start of a new run, is all that one needs
    whose training state was removed; `Checkpointer.find` asks for the training state too.
    """
    found = [(CHECKPOINT_NAME.fullmatch(item.name), item) for item in folder.iterdir()] if folder.is_dir() else []
    return dict(sorted((int(match[1]), item) for match, item in found if match))


def find_weights(path: Path, key: str = "init_from") -> Path:
    """The weights file in a run's folder, a checkpoint's or its `consolidated`, or the file itself.

    Raises:
        ConfigError: when there is none; names `key`, the setting that `path` is the value of.
    """
    newest = list(list_checkpoints(path / "checkpoints").values())[-1:]
    for folder in [*newest, path]:
        for place in (folder / "consolidated", folder):
            for name in (ADAPTERS, MERGED):
                if (place / name).is_file():
                    return place / name
    if path.is_file() and path.suffix == ".safetensors":
        return path
    raise ConfigError(
        f"{key}={str(path)!r}: no finished checkpoint; give a run's folder, one of its checkpoints/checkpoint_... "
        f"or the {ADAPTERS} or {MERGED} in it."
    )


def _renamed(layers: dict[str, LoRALinear]) -> dict[str, str]:
    """The keys that adapters move: as in stock moshi -> as in a model with adapters."""
    return {f"{name}.{key}": f"{name}.frozen_W.{key}" for name in layers for key in ("weight", "bias")}


def _adapter_names(model: nn.Module, layers: dict[str, LoRALinear]) -> set[str]:
    """Names in the model of what an adapter file holds."""
    inside = _renamed(layers)
    names = lora_parameters(model).keys() | {stock_name(name) for name in moshi_patch.ttt_parameters(model)}
    w_down = [f"{stock_name(name)}.linear_out.weight" for name in moshi_patch.ttt_gatings(model)]
    names |= {inside.get(name, name) for name in w_down}
    return names | {stock_name(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def _merge(state: dict[str, torch.Tensor], layers: dict[str, LoRALinear]) -> None:
    """Adds every adapter to its layer's weight in float32 or more, rounded once; `state` loses the adapters."""
    for name, layer in layers.items():
        down, up = state.pop(f"{name}.lora_A.weight"), state.pop(f"{name}.lora_B.weight")
        weight = state[f"{name}.frozen_W.weight"]
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.to(wide) + layer.scaling * (up.to(wide) @ down.to(wide))
        state[f"{name}.frozen_W.weight"] = merged.to(weight.dtype)


def _cast(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    own = not value.is_floating_point() or name.startswith(("condition_provider.", "fuser."))
    return value.detach().to(value.dtype if own else dtype).contiguous()


def _load_initial(path: Path, model: nn.Module) -> None:
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise RuntimeError("init_from is loaded before the model is wrapped.")
    file = find_weights(path)
    config_path = file.parent / "config.json"
    if not config_path.is_file():
        raise ConfigError(f"init_from={str(path)!r}: no config.json beside {file}; it says what the weights are.")
    config, layers = read_json(config_path), lora_layers(model)
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"init_from={str(path)!r}: {file} is damaged, or not a safetensors file ({in_one_line(error)}); give "
            "another checkpoint."
        ) from error
    adapters = bool(config.get("lora", False))
    if adapters and not layers:
        raise ConfigError(
            f"init_from={str(path)!r}: holds adapters, and lora.enable is false. Set lora.enable: true with "
            f"lora.rank: {config.get('lora_rank')}, or give a checkpoint saved with save_adapters: false."
        )
    inside, own = _renamed(layers), model.state_dict()
    values = {inside.get(name, name): value for name, value in weights.items()}
    _check_fit(path, model, values, own, adapters, config)
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)
    logger.info("init_from: %d tensors of %s", len(values), file)
    if not adapters and layers:
        logger.warning("init_from: the adapters of this run fit the base model %s; serve them with it.", file)
    _warn_of_other_ttt(model, config)


def _check_fit(
    path: Path,
    model: nn.Module,
    values: dict[str, torch.Tensor],
    own: dict[str, torch.Tensor],
    adapters: bool,
    config: dict[str, Any],
) -> None:
    """ValueError when `values` are not the weights of `model`, named as in it."""
    targets = {stock_name(name) for name in moshi_patch.ttt_parameters(model)}
    added = lora_parameters(model).keys()
    wanted = added if adapters else own.keys() - added - targets
    present = targets & values.keys()
    problems = {
        "missing": (wanted - values.keys()) | (targets - present if present else set()),
        "not in this model": values.keys() - own.keys(),
        "of another shape": {n for n in values.keys() & own.keys() if values[n].shape != own[n].shape},
        "not loaded yet": {n for n in own if own[n].is_meta},
    }
    found = [f"{len(names)} {what}, such as {min(names)}" for what, names in problems.items() if names]
    if found:
        there = {key: value for key, value in config.items() if key.startswith(("lora", "ttt_"))}
        raise ConfigError(f"init_from={str(path)!r}: does not fit: {'; '.join(found)}. Its settings: {there}.")


def _warn_of_other_ttt(model: nn.Module, config: dict[str, Any]) -> None:
    here = model.ttt_config.to_kwargs() if moshi_patch.ttt_gatings(model) else {}
    for key, value in here.items():
        if key in config and config[key] != value:
            logger.warning("init_from: %s is %r, was %r in that run.", key, value, config[key])
