"""How x0, the input of the transformer stack, reaches each TTT layer: as an argument of the layer call.

An argument survives what a remembered tensor would not: activation checkpointing calls the layer again in backward, two
forwards may precede one backward, and FSDP wraps the layers and casts what it is given.
"""

import torch
from moshi.modules.transformer import StreamingTransformer, StreamingTransformerLayer
from torch import nn

from .gating import target_source


class TTTTransformerLayer(StreamingTransformerLayer):
    """A stock layer that also takes `ttt_x0`. Any layer of a transformer with TTT, as all get the same arguments."""

    def forward(
        self,
        x: torch.Tensor,
        cross_attention_src: torch.Tensor | None = None,
        ttt_x0: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `StreamingTransformerLayer.forward`; `ttt_x0 [B, T, D]` is the input of the transformer stack."""
        token = target_source.set(ttt_x0)
        try:
            return super().forward(x, cross_attention_src)
        finally:
            target_source.reset(token)


def pass_x0_to_layers(transformer: StreamingTransformer) -> None:
    """Make every call of `transformer` hand its own input to all of its layers."""
    for layer in transformer.layers:
        layer.__class__ = TTTTransformerLayer
    transformer.register_forward_pre_hook(_add_x0, with_kwargs=True)


def _add_x0(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    x0 = args[0] if args else kwargs["x"]
    return args, {**kwargs, "ttt_x0": x0}
