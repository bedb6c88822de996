"""Passes along with each layer call what its memory needs: x0, the input of the stack, and which switches are off.

Arguments survive what a remembered value would not: activation checkpointing calls a layer again in backward, two
forwards may precede one backward, and FSDP wraps the layers and casts what they are given. Stock `_ff_block` passes on
nothing but x, so between a layer's own call and its memory the arguments stand in a context variable.
"""

from contextvars import ContextVar
from typing import NamedTuple

import torch
from moshi.modules.transformer import StreamingTransformer
from torch import nn


class LayerCall(NamedTuple):
    """What the layer call in progress was given.

    Attributes:
        x0: `[B, T, D]`, the input of the transformer stack; None if no target is made of it.
        muted: ids of the memories that make no update in this call.
        bypassed: ids of those that nothing is read from.
    """

    x0: torch.Tensor | None = None
    muted: frozenset[int] = frozenset()
    bypassed: frozenset[int] = frozenset()


current_call: ContextVar[LayerCall | None] = ContextVar("current_call", default=None)
"""Bound by the hooks below for the duration of a layer call."""


class _AddArguments:
    """Forward pre-hook of a transformer: hands each of its layers `ttt_x0`, `ttt_muted` and `ttt_bypassed`."""

    def __init__(self, memories: list[nn.Module], with_x0: bool):
        self.memories = memories
        self.with_x0 = with_x0

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        x0 = (args[0] if args else kwargs["x"]) if self.with_x0 else None
        muted = frozenset(id(memory) for memory in self.memories if not memory.updates_enabled)
        bypassed = frozenset(id(memory) for memory in self.memories if memory.bypassed)
        return args, {**kwargs, "ttt_x0": x0, "ttt_muted": muted, "ttt_bypassed": bypassed}


def _bind(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    kwargs = dict(kwargs)
    given = {name: kwargs.pop(f"ttt_{name}") for name in LayerCall._fields if f"ttt_{name}" in kwargs}
    current_call.set(LayerCall(**given))
    return args, kwargs


def _unbind(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    current_call.set(None)


class _NoteFinite:
    """Forward hook of a transformer: tells the state of its last TTT layer what the whole stack answered.

    Whatever is not finite anywhere in a row reaches the stack's output in the same step, through the residual stream.
    """

    def __init__(self, memory: nn.Module):
        self.memory = memory

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if self.memory.is_streaming:
            self.memory._streaming_state.note_finite(output)


def pass_arguments(transformer: StreamingTransformer, memories: list[nn.Module], with_x0: bool) -> None:
    """Let every call of `transformer` tell its layers, whatever their class, what `memories` need to know."""
    transformer.register_forward_pre_hook(_AddArguments(memories, with_x0), with_kwargs=True)
    transformer.register_forward_hook(_NoteFinite(memories[-1]))
    for layer in transformer.layers:
        layer.register_forward_pre_hook(_bind, with_kwargs=True)
        layer.register_forward_hook(_unbind, always_call=True)
