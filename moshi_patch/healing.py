"""A reset row is a fresh row whatever it held, NaN and inf included.

Stock `RingKVCache.reset` moves a row's position back and keeps its keys and values. Masked attention weighs them by
zero, and zero times NaN is NaN: a row that was not finite once would never be finite again, and what a conversation
said would stay in memory. Cross-attention keys stay: they are made of the conditions, not of the stream.
"""

from types import MethodType

import torch
from moshi.modules.streaming import State
from moshi.modules.transformer import RingKVCache, StreamingMultiheadAttention
from torch import nn

from .kinds.rows import fill_rows_


class ForgettingKVCache(RingKVCache):
    """A stock cache, `cache [2, B, heads, capacity, D / heads]`, that holds nothing of a row after its reset."""

    def reset(self, reset_mask: torch.Tensor) -> None:
        """Clear the rows where `reset_mask [B]` is true. A position that all rows share is reset with any of them."""
        fill_rows_(self.cache, reset_mask, 0.0, dim=1)
        fill_rows_(self.end_offset, reset_mask if self.respect_exec_mask else reset_mask.any()[None], 0)


def _with_forgetting_cache(attention: StreamingMultiheadAttention, batch_size: int) -> State:
    """The state that the attention's own class makes, with a cache that forgets."""
    state = type(attention)._init_streaming_state(attention, batch_size)
    if type(state.kv_cache) is RingKVCache:
        state.kv_cache.__class__ = ForgettingKVCache
    return state


def forget_on_reset(model: nn.Module) -> None:
    """Give every attention of `model`, those of the depformer included, caches that forget. No class is changed."""
    for module in model.modules():
        if isinstance(module, StreamingMultiheadAttention):
            module._init_streaming_state = MethodType(_with_forgetting_cache, module)
