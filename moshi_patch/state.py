"""The streaming state of a TTT layer, in moshi's own protocol: rows with exec masks, partial resets and snapshots."""

from dataclasses import dataclass

import torch
from moshi.modules.streaming import State

from .ops import FastWeight


@dataclass
class TTTState(State):
    """State of one `TTTGating` while streaming; a `moshi.modules.streaming.State` like that of the KV cache.

    It is no part of the module's `state_dict` and untouched by `Module.to()`: the delta stays float32.

    Attributes:
        fast: the fast weights of `batch_size` rows.
    """

    fast: FastWeight

    def reset(self, reset_mask: torch.Tensor) -> None:
        """Rows where `reset_mask [B]` is true become, bit for bit, those of a fresh stream."""
        super().reset(reset_mask)
        self.fast.reset(reset_mask)
