"""Over which base model a checkpoint that holds no base was trained: a fingerprint of all weights that did not train.

It stands in the header of `ttt.safetensors`, which `training_mode: ttt` with `save_adapters` saves.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from moshi.models import LMModel, loaders
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed._shard.sharded_tensor import ShardedTensor

import moshi_patch

from ..common.distributed import Context
from ..common.errors import ConfigError
from ..model.base import refuse_not_finite
from ..model.conditions import ALWAYS_FLOAT32

VALUE_KEY, DTYPE_KEY = moshi_patch.BASE_KEY, "base_dtype"
"""In the header's metadata."""

NO_FINGERPRINT = "its header has no fingerprint of its base model; copy it again."

ALONE = Context(0, 1, 0, torch.device("cpu"))
"""One process on the CPU."""


@dataclass(frozen=True)
class BaseFingerprint:
    """SHA-256 over the sums of all weights that a checkpoint does not hold.

    Args:
        dtype: the precision in which the base was trained over, a name of torch; the sums are of its bits.
    """

    value: str
    dtype: str

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        return {VALUE_KEY: self.value, DTYPE_KEY: self.dtype}

    def refuse_other(self, weights: Mapping[str, torch.Tensor], what: str, remedy: str) -> None:
        """Raises a ConfigError that begins with `what` unless `weights`, by their names, are those of this base."""
        dtype = getattr(torch, self.dtype)
        cast = {name: in_precision(name, value, dtype) for name, value in weights.items()}
        if fingerprint_of(bit_sums(cast, ALONE)) != self.value:
            raise ConfigError(f"{what}: is not the base model that this was trained over (other fingerprint). {remedy}")


def fingerprint_of(sums: Mapping[str, int]) -> str:
    """Of the `bit_sums` of a base model's weights."""
    return hashlib.sha256(json.dumps(dict(sorted(sums.items()))).encode()).hexdigest()


def read_base_fingerprint(weights: Path) -> BaseFingerprint | None:
    """That in the header of a file; None when there is none, or the file cannot be read."""
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    dtype = metadata.get(DTYPE_KEY)
    if VALUE_KEY not in metadata or not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        return None
    return BaseFingerprint(metadata[VALUE_KEY], dtype)


@torch.no_grad()
def load_over_base(
    weights: Path, base: Path, lm_kwargs: Mapping[str, Any], device: torch.device, dtype: torch.dtype, remedy: str
) -> LMModel:
    """The base model in the precision that it was trained over in, with what trained put into it, then in `dtype`.

    Args:
        weights: what trained alone.
        remedy: what to do when `base` is not the base that it was trained over.

    Raises:
        ConfigError: when it is not, or a weight of it is not finite.
    """
    recorded = read_base_fingerprint(weights)
    if recorded is None:
        raise ConfigError(f"{weights}: {NO_FINGERPRINT}")
    trained_in = getattr(torch, recorded.dtype)
    model = loaders.get_moshi_lm(base, copy.deepcopy(dict(lm_kwargs)), device=device, dtype=trained_in)
    own, held = model.state_dict(), load_file(weights)
    recorded.refuse_other({name: own[name] for name in own if name not in held}, str(base), remedy)
    refuse_not_finite(model, str(base))
    for name, value in held.items():
        own[name].copy_(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data = in_precision(name, tensor.data, dtype)
    return model


def in_precision(name: str, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A weight as moshi loads it in `dtype`: conditioners stay as they are, in float32."""
    own = not value.is_floating_point() or name.startswith(ALWAYS_FLOAT32)
    return value.detach().to(value.dtype if own else dtype)


def bit_sums(tensors: Mapping[str, Any], ctx: Context) -> dict[str, int]:
    """The sum of each tensor's bits, as integers: exact and the same in any order, hence on any number of ranks.

    Collective. On one process tensors may be on any device.
    """
    sums = []
    for tensor in tensors.values():
        sharded = isinstance(tensor, ShardedTensor)
        whole = [tensor] if ctx.rank == 0 else []
        parts = [shard.tensor for shard in tensor.local_shards()] if sharded else whole
        zero = torch.zeros((), dtype=torch.int64, device=ctx.device)
        sums.append(sum((_bits(part).sum().to(ctx.device) for part in parts), zero))
    total = torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=ctx.device)
    if ctx.world_size > 1:
        dist.all_reduce(total)
    return dict(zip(tensors, total.tolist(), strict=True))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().flatten().view(integers[tensor.element_size()])
