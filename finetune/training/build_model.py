"""From the settings of a run to the model that trains: loaded by rank 0, adapters added, frozen, sharded by FSDP."""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch
from moshi.models.loaders import CheckpointInfo
from torch import nn

import moshi_patch

from ..checkpoint.initial import load_initial_weights
from ..common.distributed import Context, on_all_ranks
from ..model.adapters import add_adapters
from ..model.base import lm_kwargs, load_base
from ..model.initial_targets import new_targets, start_targets
from ..model.trainable import FIRST_GROUPS, describe, parameter_groups
from ..settings.modes import trains_ttt
from ..settings.schema import TrainArgs
from .sharding import shard

logger = logging.getLogger(__name__)


@dataclass
class BuiltModel:
    """A model ready to train.

    Args:
        model: wrapped by FSDP when there are several processes, in training mode; what does not train is frozen.
        lm_config: content of `config.json` for this model, as trained; JSON-able.
        info: the files it was made from. Only rank 0 has the path of the weights.
    """

    model: nn.Module
    lm_config: dict[str, Any]
    info: CheckpointInfo


def build_model(args: TrainArgs, ctx: Context) -> BuiltModel:
    """The base model of `args.moshi_paths` with TTT and adapters as set, the same on every rank for `args.seed`.

    Rank 0 alone reads the weights, the others start on the meta device and receive them. New adapters start at zero
    (A random, B zero), new target generators at zero (convolution) and `ttt.init_target` (W_target).

    Raises:
        ConfigError: when the base model and the settings do not go together.
    """
    moshi_patch.install()
    torch.manual_seed(args.seed)
    model, info = on_all_ranks(ctx, lambda: load_base(args, ctx))
    logger.info("%s", moshi_patch.fit_threads(model) or f"On {ctx.device}.")
    if args.lora.enable:
        add_adapters(model, args.lora.rank, args.lora.scaling)
    if args.init_from is not None:  # also when resuming: frozen weights are saved with no checkpoint
        load_initial_weights(args.init_from, model, ctx)
    start_targets(model, args.ttt.init_target)
    if ctx.rank == 0 and not trains_ttt(args) and (idle := new_targets(model)):
        logger.warning(
            "training_mode=%r: the new weights of %d TTT layers were never trained and do not train, so their updates "
            "do nothing; begin from trained ones with init_from.",
            args.training_mode,
            idle,
        )
    groups = parameter_groups(model, args)
    model.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    logger.info(
        "training_mode=%s. Trainable parameters:\n%s", args.training_mode, describe(groups, sizes, sum(sizes.values()))
    )
    first = [group.name for group in groups if group.name in FIRST_GROUPS]
    if args.ttt.first_steps and first:
        logger.info("The first %d steps train %s alone.", args.ttt.first_steps, " and ".join(first))
    if ctx.world_size > 1:
        model = shard(model, ctx, parts=not args.full_finetuning)
    return BuiltModel(model.train(), trained_config(info, args), info)


def trained_config(info: CheckpointInfo, args: TrainArgs) -> dict[str, Any]:
    """Content of `config.json` for the model that `args` trains: the base's, every `ttt_` key, adapters as trained."""
    config = copy.deepcopy(info.raw_config) if info.raw_config is not None else lm_kwargs(info)
    for key in ("lora_name", *moshi_patch.LORA_KEYS):
        config.pop(key, None)
    config = moshi_patch.DEFAULT_NAMES | {key: value for key, value in config.items() if not key.startswith("ttt_")}
    config |= args.ttt.to_kwargs() | {"lora": args.lora.enable}
    if args.lora.enable:
        config |= {"lora_rank": args.lora.rank, "lora_scaling": args.lora.scaling}
    return config
