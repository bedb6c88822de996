"""`TTTGating`: the gated MLP of a Moshi layer whose down projection keeps learning from the stream.

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width, `C` chunk size.

The projection is called and never read: it may be an `nn.Linear`, a `LoRALinear`, a `QLinear` or a shard of FSDP, and
no forward pass ever writes a parameter. What was learnt is an additive term with a state of its own.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from moshi.modules.gating import ActivationGating
from moshi.modules.lora import LoRALinear
from moshi.modules.streaming import State, StreamingModule
from moshi.utils.compile import no_compile, torch_compile_lazy
from moshi.utils.quantize import QLinear
from torch import nn

from ...call import current_call
from ...config import TTTConfig
from .ops import FastWeight, ResidualFastWeight, dual, segment_, step_
from .target import TargetGenerator

SEGMENT_STEPS = 16
"""Steps, or C / 4 if that is more, from which a streamed segment is worth its matrix products over whole chunks."""


@torch_compile_lazy
def _gated_hidden(weight_in: torch.Tensor, activation, x: torch.Tensor) -> torch.Tensor:
    return _gate(nn.functional.linear(x, weight_in), activation)


def _gate(gu: torch.Tensor, activation) -> torch.Tensor:
    """`act(g) * u`, computed with the operations of `moshi.modules.gating`, hence with the same bits."""
    gu = gu.unflatten(-1, (2, -1))
    return activation(gu[..., 0, :]) * gu[..., 1, :]


@dataclass
class TTTState(State):
    """State of one `TTTGating` while streaming; a `moshi.modules.streaming.State` like that of the KV cache.

    It is no part of the module's `state_dict` and untouched by `Module.to()`: the delta stays float32.

    Attributes:
        fast: the fast weights of `batch_size` rows.
        finite: `[B]` bool, whether all that the transformer answered since a row's reset was finite. Kept by the last
            TTT layer of a transformer.
    """

    fast: FastWeight
    finite: torch.Tensor

    def reset(self, reset_mask: torch.Tensor) -> None:
        """Rows where `reset_mask [B]` is true become, bit for bit, those of a fresh stream."""
        super().reset(reset_mask)
        self.fast.reset(reset_mask)
        self.finite |= reset_mask

    def note_finite(self, answer: torch.Tensor) -> None:
        """Remember which executed rows of `answer [B, T, D]` are not finite. Does not wait for the device."""
        self.finite &= answer.isfinite().flatten(1).all(1) | ~self.exec_mask


class TTTGating(StreamingModule[TTTState]):
    """Stands in `layer.gating` for a stock `ActivationGating` and takes over its two projections.

    Args:
        gating: the stock module.
        config: the TTT settings.
        device, dtype: of the target generator's weights.

    Attributes:
        linear_in, linear_out: the stock projections, under their stock keys.
        target_generator: the only new weights.
    """

    _fsdp_final = True  # as the stock gating: kept whole by moshi's own FSDP wrapping

    def __init__(self, gating: ActivationGating, config: TTTConfig, device=None, dtype=None):
        super().__init__()
        self.config = config
        self.activation = gating.activation
        self.linear_in = gating.linear_in
        self.linear_out = gating.linear_out
        self.dim, self.hidden = gating.linear_out.weight.shape
        self.target_generator = TargetGenerator(
            self.dim, config.conv_kernel_size, config.conv_depthwise, device=device, dtype=dtype
        )
        self.updates_enabled = True
        self._enabled: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`: the stock gated MLP plus what the fast weight adds.

        While streaming, the state advances by T steps and gradients do not flow through the fast weight.

        Raises:
            ValueError: with `ttt_target="token_embeddings"`, when called outside of its transformer.
        """
        z = self._hidden(x)
        out = self.linear_out(z)
        call = current_call.get()
        source = x if self.config.target == "hidden_states" else call and call.x0
        if source is None:
            raise ValueError(
                'ttt_target="token_embeddings" needs the input of the transformer stack: call the layer through its '
                "transformer, or pass it as layer(x, ttt_x0=x0)."
            )
        if self._streaming_state is not None:
            return self._stream(self._streaming_state, out, z, source)
        muted = id(self) in call.muted if call else not self.updates_enabled
        return out if muted else self._one_pass(out, z, source)

    def _hidden(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.linear_in, nn.Linear):
            return _gate(self.linear_in(x), self.activation)
        with no_compile() if self.training else nullcontext():
            return _gated_hidden(self.linear_in.weight, self.activation, x)

    def _one_pass(self, out: torch.Tensor, z: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        config, steps = self.config, z.shape[1]
        needed = (steps - 1) // config.chunk_size * config.chunk_size  # nobody reads the last chunk's targets
        if not needed:
            return out
        v = self.target_generator(x0[:, :needed], config.chunk_size)
        return dual(out, z, v, config.chunk_size, config.learning_rate, update=config.update, **self._update_options())

    @torch.no_grad()
    def _stream(self, state: TTTState, out: torch.Tensor, z: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """In one of three ways that leave the same state: a skipped segment, a segment in whole, or step by step."""
        if z.shape[1] >= max(SEGMENT_STEPS, self.config.chunk_size // 4):
            if self.updates_enabled:
                return self._stream_segment(state, out, z, x0)
            if state.fast.untouched():
                return self._skip_segment(state, out)
        return self._stream_steps(state, out, z, x0)

    def _skip_segment(self, state: TTTState, out: torch.Tensor) -> torch.Tensor:
        """Nothing was learnt and nothing is written: positions alone move on."""
        state.fast.position += out.shape[1] * state.exec_mask
        return out

    def _stream_segment(self, state: TTTState, out: torch.Tensor, z: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        targets = partial(self.target_generator, chunk_size=self.config.chunk_size)
        return segment_(
            state.fast, out, z, x0, targets, self.config.learning_rate, state.exec_mask, **self._update_options()
        )

    def _stream_steps(self, state: TTTState, out: torch.Tensor, z: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """The only one that a CUDA graph replays."""
        deltas = [
            step_(
                state.fast,
                z[:, t],
                self.target_generator.taps(x0[:, t]),
                self.config.learning_rate,
                state.exec_mask,
                enabled=self._enabled,
                **self._update_options(),
            )
            for t in range(z.shape[1])
        ]
        delta = torch.stack(deltas, 1)
        return (out.to(delta.dtype) + delta).to(out.dtype)

    def _update_options(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in ("delta_clip", "decay", "target_gain")}

    def _init_streaming_state(self, batch_size: int) -> TTTState:
        device = next(self.target_generator.parameters()).device
        if self._enabled is None or self._enabled.device != device:
            with torch.inference_mode(False):  # it outlives this stream and must stay writable
                self._enabled = torch.tensor(self.updates_enabled, device=device)
        kind = ResidualFastWeight if self.config.update == "residual" else FastWeight
        fast = kind.allocate(batch_size, self.dim, self.hidden, self.config.chunk_size, self._hidden_dtype(), device)
        return TTTState(batch_size, device, fast, torch.ones(batch_size, dtype=torch.bool, device=device))

    def set_updates(self, enabled: bool) -> None:
        """Whether what is heard from now on is written. Reaches replayed CUDA graphs too."""
        self.updates_enabled = enabled
        if self._enabled is not None:
            self._enabled.fill_(enabled)

    def delta(self) -> torch.Tensor:
        """`[B, D, H]`: what all rows that stream have learnt, the fast weight minus W_0. Allocates it; for reports."""
        return self._streaming_state.fast.full_delta(self.config.learning_rate * self.config.target_gain)

    def _hidden_dtype(self) -> torch.dtype:
        if isinstance(self.linear_in, QLinear):
            return torch.float16
        if isinstance(self.linear_in, LoRALinear):
            return self.linear_in.lora_A.weight.dtype
        return self.linear_in.weight.dtype

    @torch.no_grad()
    def w_down(self) -> torch.Tensor:
        """A copy of W_0 `[D, H]`, whatever holds it, in at least float32. For reports."""
        linear = self.linear_out
        if isinstance(linear, QLinear):
            return linear.weight.float() * (linear.weight_scb.float()[:, None] / 127)
        weight = linear.merge_weight() if isinstance(linear, LoRALinear) else linear.weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
