"""From the settings of a run to the model that trains: loaded by rank 0, adapters added, frozen, sharded by FSDP."""

import copy
import functools
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from moshi.models import LMModel, loaders
from moshi.models.loaders import CheckpointInfo
from moshi.modules.lora import LoRALinear, replace_all_linear_with_lora
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

import moshi_patch

from .args import TrainArgs
from .base import lm_kwargs, load_base
from .distributed import Context, on_all_ranks
from .optim import describe, parameter_groups
from .target_init import start_targets
from .weights import load_finished_weights

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
    if args.lora.enable:
        add_adapters(model, args.lora.rank, args.lora.scaling)
    if args.init_from is not None:  # also when resuming: frozen weights are saved with no checkpoint
        load_finished_weights(args.init_from, model, ctx)
    start_targets(model, args.ttt.init_target)
    groups = parameter_groups(model, args)
    model.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    logger.info("Trainable parameters:\n%s", describe(groups, sizes, sum(sizes.values())))
    if ctx.world_size > 1:
        model = shard(model, ctx, parts=not args.full_finetuning)
    return BuiltModel(model.train(), trained_config(info, args), info)


def trained_config(info: CheckpointInfo, args: TrainArgs) -> dict[str, Any]:
    """Content of `config.json` for the model that `args` trains: the base's, every `ttt_` key, adapters as trained."""
    config = copy.deepcopy(info.raw_config) if info.raw_config is not None else lm_kwargs(info)
    for key in ("lora_name", "lora_rank", "lora_scaling"):
        config.pop(key, None)
    config.setdefault("moshi_name", loaders.MOSHI_NAME)
    config.setdefault("mimi_name", loaders.MIMI_NAME)
    config.setdefault("tokenizer_name", loaders.TEXT_TOKENIZER_NAME)
    config |= args.ttt.lm_kwargs() | {"lora": args.lora.enable}
    if args.lora.enable:
        config |= {"lora_rank": args.lora.rank, "lora_scaling": args.lora.scaling}
    return config


def add_adapters(model: nn.Module, rank: int, scaling: float) -> None:
    """LoRA on every linear layer, changing nothing yet: A random, B zero. Stays on the meta device where `model` is."""
    replace_all_linear_with_lora(model, rank, scaling, device="meta")
    for module in model.modules():
        if isinstance(module, LoRALinear):
            device = module.frozen_W.weight.device
            for linear in (module.lora_A, module.lora_B):
                linear.to_empty(device=device)
            nn.init.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))
            nn.init.zeros_(module.lora_B.weight)


def shard(model: LMModel, ctx: Context, *, parts: bool) -> FullyShardedDataParallel:
    """`model` under FSDP with the wrap policies of moshi-finetune; rank 0's weights reach all ranks on the way.

    Gradients are reduced in float32 at least. The condition provider, always frozen, is not sharded: it is used outside
    of the model's forward.

    Args:
        parts: wrap every module that trains as a whole by itself, too: what is gathered and reduced for it is then its
            own, and nothing is for the frozen rest. Not for full fine-tuning: stock modules read the weights of others.
    """
    whole = [module for module in (model.condition_provider, model.fuser) if module is not None]
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=(StreamingTransformerLayer,))
    if parts:
        trainable = functools.partial(lambda_auto_wrap_policy, lambda_fn=_is_trainable)
        policy = functools.partial(_or_policy, policies=[trainable, policy])
    cuda = ctx.device.type == "cuda"
    for module in whole if cuda else [model]:  # FSDP itself sends weights between GPUs alone
        _receive(module, ctx)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=policy,
        sharding_strategy=ShardingStrategy.FULL_SHARD,
        mixed_precision=MixedPrecision(reduce_dtype=torch.float32) if model.dtype.itemsize < 4 else None,
        device_id=ctx.device,
        sync_module_states=cuda,
        param_init_fn=lambda module: module.to_empty(device=ctx.device, recurse=False),
        use_orig_params=True,
        ignored_modules=whole,
    )


def _is_trainable(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):  # never called, and wrapped they have no length
        return False
    return bool(parameters) and all(parameter.requires_grad for parameter in parameters)


@torch.no_grad()
def _receive(module: nn.Module, ctx: Context) -> None:
    """Moves `module` to the device of this rank, with the values of rank 0."""
    if ctx.rank == 0:
        module.to(ctx.device)
    else:
        module.to_empty(device=ctx.device)
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)
