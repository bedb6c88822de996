"""A model under FSDP, with the weights of rank 0 on all ranks."""

import functools

import torch
import torch.distributed as dist
from moshi.models import LMModel
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy

from ..common.distributed import Context


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
