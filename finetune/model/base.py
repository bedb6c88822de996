"""The base model on the disk: which files it is, whether they can be trained on, and what is read from them."""

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import LocalEntryNotFoundError
from moshi.models import LMModel, loaders
from moshi.models.loaders import CheckpointInfo

import moshi_patch
from moshi_patch import TTTConfig

from ..common.disk import reading
from ..common.distributed import Context
from ..common.errors import ConfigError, in_one_line
from ..data.text_tokenizer import load_text_tokenizer
from ..settings.modes import saves_trained_alone
from ..settings.schema import MoshiPaths, TrainArgs, ttt_setting
from .mimi import mimi_problems
from .tensor_file import not_finite, read_header

NOT_READ = "weights-are-read-by-rank-0-alone"


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
        check_base(info, args)
        if ctx.rank != 0:
            return _make(info, args, None, "meta"), info
    with reading(
        f"moshi_paths.moshi_path={str(info.moshi_weights)!r}: cannot be loaded into the model of {config_path!r}"
    ):
        _check_ttt_layers(info, args.ttt)
        # With several processes FSDP moves one layer at a time to the GPU, which never holds the whole model.
        model = _make(info, args, info.moshi_weights, ctx.device if ctx.world_size == 1 else "cpu")
    refuse_not_finite(model, f"moshi_paths.moshi_path={str(info.moshi_weights)!r}")
    return model, info


def refuse_not_finite(model: LMModel, what: str) -> None:
    """Raises a ConfigError that begins with `what` when any weight of a loaded model is NaN or infinite."""
    if broken := not_finite(model.state_dict().items()):
        raise ConfigError(f"{what}: NaN or infinity in {broken}. Copy the file anew.")


def find_base_files(paths: MoshiPaths, *, weights: bool = True) -> CheckpointInfo:
    """The files of the base model: a Hub repository, a folder laid out like one, or single files.

    Args:
        weights: False spares downloading the language model; its path is then a placeholder.

    Raises:
        ConfigError: for a file that a local folder lacks or that cannot be fetched, a configuration that is not JSON,
            or a Mimi or text tokenizer that is broken or of another model.
    """
    repo, config_path = paths.hf_repo_id, paths.config_path
    with reading(f"moshi_paths.hf_repo_id={repo!r}: its files cannot be found"):
        given: dict[str, Any] = {
            "moshi_weights": paths.moshi_path if weights else Path(NOT_READ),
            "mimi_weights": paths.mimi_path,
            "tokenizer": paths.tokenizer_path,
            "config_path": None if config_path is None else loaders.hf_get(config_path),
        }
        files = {name: value for name, value in given.items() if value is not None}
        folder = files["config_path"].parent if repo is None else Path(repo)
        if "config_path" not in files and folder.is_dir() and not (folder / "config.json").is_file():
            raise ConfigError(f"moshi_paths.hf_repo_id={str(folder)!r}: the folder has no config.json.")
        try:
            info = moshi_patch.load_checkpoint_info(folder if repo is None else repo, **files)
        except (moshi_patch.RepositoryError, LocalEntryNotFoundError) as error:
            remedy = "Copy what is missing or damaged anew, or name other files in moshi_paths."
            raise ConfigError(f"moshi_paths: {in_one_line(error, 600)}. {remedy}") from error
    load_text_tokenizer(info.tokenizer, info.lm_config)
    if problems := mimi_problems(info.mimi_weights, info.mimi_config):
        raise ConfigError(
            f"moshi_paths.mimi_path={str(info.mimi_weights)!r}: is broken: {' '.join(problems)} Copy it anew."
        )
    return info


def lm_kwargs(info: CheckpointInfo) -> dict[str, Any]:
    """A copy to change freely: moshi's dictionary is shared by the process, and its loader writes into nested ones."""
    return copy.deepcopy(loaders._lm_kwargs if info.lm_config is None else info.lm_config)


def check_base(info: CheckpointInfo, args: TrainArgs) -> None:
    """Whether a base model can be trained with `args`, as far as its configuration says.

    Raises:
        ConfigError: when it cannot.
    """
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
    if (adapters or saves_trained_alone(args)) and config.get("lora") and info.lora_weights is not None:
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
    try:
        names = read_header(path)
    except ConfigError as error:
        raise ConfigError(f"moshi_paths.moshi_path={str(path)!r}: is broken: {error} Copy it anew.") from error
    found = [key for name in names if (key := moshi_patch.memory_key(name))]
    for key in found:
        if ttt.enabled and key.kind != ttt.kind:
            raise ConfigError(
                f"ttt.kind={ttt.kind!r}: the base model {path} has TTT weights of the kind {key.kind!r}; set it to "
                "that, or use a base model without TTT."
            )
    there = sorted({key.layer for key in found})
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
