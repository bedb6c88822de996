"""The base model on the disk: which files it is, whether they can be trained on, and what is read from them."""

import copy
import re
from pathlib import Path
from typing import Any

import torch
from moshi.models import LMModel, loaders
from moshi.models.loaders import CheckpointInfo
from safetensors import safe_open

from moshi_patch import TTTConfig

from ..common.disk import reading
from ..common.distributed import Context
from ..common.errors import ConfigError
from ..common.files import read_json
from ..data.text_tokenizer import load_text_tokenizer
from ..settings.schema import MoshiPaths, TrainArgs, ttt_setting

NOT_READ = "weights-are-read-by-rank-0-alone"
TTT_KEY = re.compile(r"transformer\.layers\.(\d+)\.gating\.target_generator\.")


def load_base(args: TrainArgs, ctx: Context) -> tuple[LMModel, CheckpointInfo]:
    """The base model with TTT as set and without adapters (its own are merged), and the files it is made from.

    Rank 0 alone reads the weights, to its device, or to the CPU for several ranks; on the others the model is on the
    meta device, and the path of the weights a placeholder.

    Raises:
        ConfigError: when a file is damaged, or the base model and the settings do not go together; names the file.
    """
    paths = args.moshi_paths
    info = find_base_files(paths, weights=ctx.rank == 0)
    config_path = paths.config_path or f"{paths.hf_repo_id}/config.json"
    with reading(f"moshi_paths.config_path={config_path!r}: no model can be made from it"):
        _check_base(info, args)
        if ctx.rank != 0:
            return _make(info, args, None, "meta"), info
    with reading(
        f"moshi_paths.moshi_path={str(info.moshi_weights)!r}: cannot be loaded into the model of {config_path!r}"
    ):
        _check_ttt_layers(info, args.ttt)
        # With several processes FSDP moves one layer at a time to the GPU, which never holds the whole model.
        return _make(info, args, info.moshi_weights, ctx.device if ctx.world_size == 1 else "cpu"), info


def find_base_files(paths: MoshiPaths, *, weights: bool = True) -> CheckpointInfo:
    """The files of the base model: a Hub repository, a folder laid out like one, or single files.

    Args:
        weights: False spares downloading the language model; its path is then a placeholder.

    Raises:
        ConfigError: for a file that a local folder lacks or that cannot be fetched, a configuration that is not JSON,
            or a text tokenizer of another model.
    """
    repo, config_path = paths.hf_repo_id, paths.config_path
    with reading(f"moshi_paths.hf_repo_id={repo!r}: its files cannot be found"):
        given: dict[str, Any] = {
            "moshi_weights": paths.moshi_path,
            "mimi_weights": paths.mimi_path,
            "tokenizer": paths.tokenizer_path,
            "config_path": None if config_path is None else loaders.hf_get(config_path),
        }
        files = {name: value for name, value in given.items() if value is not None}
        if repo is None or Path(repo).is_dir():
            files = _files_in(files["config_path"].parent if repo is None else Path(repo), files) | files
        elif config_path is not None:
            _read_config(files["config_path"])
        if not weights:
            files["moshi_weights"] = Path(NOT_READ)
        info = CheckpointInfo.from_hf_repo(str(repo), **files)
    load_text_tokenizer(info.tokenizer, info.lm_config)
    return info


def lm_kwargs(info: CheckpointInfo) -> dict[str, Any]:
    """A copy to change freely: moshi's dictionary is shared by the process, and its loader writes into nested ones."""
    return copy.deepcopy(loaders._lm_kwargs if info.lm_config is None else info.lm_config)


def _files_in(folder: Path, given: dict[str, Any]) -> dict[str, Path]:
    """Where a local folder has the files that a repository's `config.json` names; those in `given` are not needed."""
    config_path = given.get("config_path", folder / "config.json")
    if not config_path.is_file():
        raise ConfigError(f"moshi_paths.hf_repo_id={str(folder)!r}: the folder has no config.json.")
    config = _read_config(config_path)
    names = {
        "moshi_weights": config.get("moshi_name", loaders.MOSHI_NAME),
        "mimi_weights": config.get("mimi_name", loaders.MIMI_NAME),
        "tokenizer": config.get("tokenizer_name", loaders.TEXT_TOKENIZER_NAME),
        "mimi_config_path": config.get("mimi_config_name"),
        "lora_weights": config.get("lora_name"),
    }
    elsewhere = ("hf://", "file://")  # moshi finds these by itself
    found = {
        key: folder / name
        for key, name in names.items()
        if name is not None and key not in given and not name.startswith(elsewhere)
    }
    for path in found.values():
        if not path.is_file():
            raise ConfigError(f"moshi_paths: {config_path} names {path.name!r}, and there is no such file in {folder}.")
    if "mimi_config_path" in found:
        _read_config(found["mimi_config_path"])
    return {"config_path": config_path, **found}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError as error:
        raise ConfigError(f"moshi_paths: {error} Copy it anew, or name another in moshi_paths.config_path.") from error


def _check_base(info: CheckpointInfo, args: TrainArgs) -> None:
    config = info.lm_config or {}
    if config.get("quantize"):
        raise ConfigError(
            f"moshi_paths.hf_repo_id={args.moshi_paths.hf_repo_id!r}: its weights are quantised and cannot be trained; "
            "use the bf16 model."
        )
    tensors = [name for name, settings in config.get("conditioners", {}).items() if settings["type"] == "tensor"]
    if tensors:
        raise ConfigError(
            f"moshi_paths.hf_repo_id={args.moshi_paths.hf_repo_id!r}: the model takes the tensor conditions "
            f"{', '.join(tensors)}; training data holds text conditions alone."
        )
    adapters = args.lora.enable and args.save_adapters
    if adapters and config.get("lora") and info.lora_weights is not None:
        raise ConfigError(
            f"save_adapters=True: the base model has adapters of its own, {info.lora_weights}, which nobody loads "
            "beneath those of this run. Set save_adapters to false, which saves the whole model, or train on an export "
            "of the base model made with --merge."
        )
    try:
        _ttt_layers(info, args.ttt)
    except ValueError as error:
        raise ConfigError(ttt_setting(str(error))) from error
    if config.get("ttt_enabled") and not args.ttt.enabled:
        raise ConfigError("ttt.enabled=False: the base model has TTT weights; set it to true, or use a stock model.")


def _ttt_layers(info: CheckpointInfo, ttt: TTTConfig) -> list[int]:
    number = (info.lm_config or {}).get("num_layers", loaders._lm_kwargs["num_layers"])
    return ttt.layer_indices(number) if ttt.enabled else []


def _check_ttt_layers(info: CheckpointInfo, ttt: TTTConfig) -> None:
    """Whether the base's own TTT weights, if it has any, are of the layers that are to have some."""
    path = info.moshi_weights
    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as file:
        there = sorted({int(match[1]) for key in file.keys() if (match := TTT_KEY.match(key))})  # noqa: SIM118
    here = _ttt_layers(info, ttt)
    if there and there != here:
        asked = f"ttt.layers={ttt.layers!r}" if ttt.enabled else "ttt.enabled=False"
        raise ConfigError(
            f"{asked}: TTT in the layers {here}, but the base model {path} has TTT weights in the layers {there}; set "
            f"ttt.enabled=true and ttt.layers={str(there).replace(' ', '')}, or use a base model without TTT."
        )


def _make(info: CheckpointInfo, args: TrainArgs, weights: Path | None, device: torch.device | str) -> LMModel:
    kwargs = lm_kwargs(info)
    adapted = weights is not None and kwargs.get("lora", False) and info.lora_weights is not None
    return loaders.get_moshi_lm(
        weights,
        kwargs | {"lora": adapted},
        device=device,
        dtype=getattr(torch, args.param_dtype),
        lora_weights=info.lora_weights if adapted else None,
        fuse_lora=True,
        lm_kwargs_overrides={"gradient_checkpointing": args.gradient_checkpointing, **args.ttt.to_kwargs()},
    )
