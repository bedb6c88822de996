"""`TTTGating`: the gated MLP of a Moshi layer whose down projection keeps learning from the stream.

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width, `C` chunk size.

The projection is called and never read: it may be an `nn.Linear`, a `LoRALinear`, a `QLinear` or a shard of FSDP, and
no forward pass ever writes a parameter. What was learnt is an additive term with a state of its own.
"""

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from moshi.modules.gating import ActivationGating
from moshi.modules.lora import LoRALinear
from moshi.modules.transformer import StreamingTransformerLayer
from moshi.utils.compile import no_compile, torch_compile_lazy
from moshi.utils.quantize import QLinear
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...call import current_call
from ...config import TTTConfig
from ..memory import TTTMemory, TTTState
from .ops import FastWeight, ResidualFastWeight, delta_norm, dual, segment_, step_
from .target import TARGET_KEYS, TargetGenerator

logger = logging.getLogger(__name__)


@torch_compile_lazy
def _gated_hidden(weight_in: torch.Tensor, activation, x: torch.Tensor) -> torch.Tensor:
    return _gate(nn.functional.linear(x, weight_in), activation)


def _gate(gu: torch.Tensor, activation) -> torch.Tensor:
    """`act(g) * u`, computed with the operations of `moshi.modules.gating`, hence with the same bits."""
    gu = gu.unflatten(-1, (2, -1))
    return activation(gu[..., 0, :]) * gu[..., 1, :]


class TTTGating(TTTMemory):
    """Stands in `layer.gating` for a stock `ActivationGating` and takes over its two projections.

    Args:
        gating: the stock module.
        config: the TTT settings.
        device, dtype: of the target generator's weights.

    Attributes:
        linear_in, linear_out: the stock projections, under their stock keys.
        target_generator: the only new weights.
    """

    place = "gating"
    weight_keys = tuple(f"target_generator.{key}" for key in TARGET_KEYS)

    def __init__(self, gating: ActivationGating, config: TTTConfig, device=None, dtype=None):
        super().__init__(config)
        self.activation = gating.activation
        self.linear_in = gating.linear_in
        self.linear_out = gating.linear_out
        self.dim, self.hidden = gating.linear_out.weight.shape
        self.target_generator = TargetGenerator(
            self.dim, config.conv_kernel_size, config.conv_depthwise, device=device, dtype=dtype
        )

    @property
    def update_steps(self) -> int:
        """The chunk size."""
        return self.config.chunk_size

    @property
    def quiet_steps(self) -> int:
        """The first chunk: a chunk never sees its own update."""
        return self.config.chunk_size

    @classmethod
    def needs_x0(cls, config: TTTConfig) -> bool:
        """Whether targets are made of it."""
        return config.target == "token_embeddings"

    @classmethod
    def check_model(cls, config: TTTConfig, arguments: Mapping[str, Any]) -> None:
        """That layers have a gated MLP, and a dtype that holds the gain. Warns of a chunk beyond the context."""
        gating = arguments["gating"]
        if gating == "none":
            raise ValueError(f'gating={gating!r}: ttt_enabled=True needs a gated MLP, such as gating="silu".')
        largest = torch.finfo(torch.float16).max
        if arguments.get("dtype") == torch.float16 and config.target_gain > largest:
            raise ValueError(
                f"ttt_target_gain={config.target_gain!r}: must be at most {largest:g} with dtype=torch.float16, whose "
                "range the answers would leave."
            )
        context = arguments.get("context")
        if context is not None and config.chunk_size > context:
            logger.warning(
                "ttt_chunk_size=%d is longer than context=%d: what leaves the attention before its chunk ends is out "
                "of reach until then.",
                config.chunk_size,
                context,
            )

    @classmethod
    def add_to(cls, layer: StreamingTransformerLayer, config: TTTConfig, device=None, dtype=None) -> "TTTGating":
        """In place of the gated MLP of `layer`."""
        layer.gating = cls(layer.gating, config, device=device, dtype=dtype)
        return layer.gating

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
        return out if self._muted(call) or self._bypassed(call) else self._one_pass(out, z, source)

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
        if self._worth_a_segment(z.shape[1]):
            if self.updates_enabled:
                return self._stream_segment(state, out, z, x0)
            if state.fast.untouched():
                return self._skip_segment(state, out)
        return self._stream_steps(state, out, z, x0, state.exec_mask)

    def _skip_segment(self, state: TTTState, out: torch.Tensor) -> torch.Tensor:
        """Nothing was learnt and nothing is written: positions alone move on."""
        state.fast.position += out.shape[1] * state.exec_mask
        return out

    def _stream_segment(self, state: TTTState, out: torch.Tensor, z: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        targets = partial(self.target_generator, chunk_size=self.config.chunk_size)
        some_muted = bool(state.muted_rows)
        run = state.exec_mask & state.learning if some_muted else state.exec_mask
        heard = segment_(state.fast, out, z, x0, targets, self.config.learning_rate, run, **self._update_options())
        heard = out if self.bypassed else heard
        if not some_muted:
            return heard
        muted = self._stream_steps(state, out, z, x0, state.exec_mask & ~state.learning)
        return torch.where(state.learning[:, None, None], heard, muted)

    def _stream_steps(
        self, state: TTTState, out: torch.Tensor, z: torch.Tensor, x0: torch.Tensor, run: torch.Tensor
    ) -> torch.Tensor:
        """The only one that a CUDA graph replays. Rows where `run [B]` is false stay as they are."""
        enabled = self._rows_enabled(state)
        deltas = [
            step_(
                state.fast,
                z[:, t],
                self.target_generator.taps(x0[:, t]),
                self.config.learning_rate,
                run,
                enabled=enabled,
                **self._update_options(),
            )
            for t in range(z.shape[1])
        ]
        delta = torch.where(self._answering, torch.stack(deltas, 1), 0.0)
        return (out.to(delta.dtype) + delta).to(out.dtype)

    def _update_options(self) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in ("delta_clip", "decay", "target_gain")}

    def _fresh(self, batch_size: int, device: torch.device) -> FastWeight:
        kind = ResidualFastWeight if self.config.update == "residual" else FastWeight
        return kind.allocate(batch_size, self.dim, self.hidden, self.config.chunk_size, self._hidden_dtype(), device)

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the target generator."""
        return {f"target_generator.{key}": weight for key, weight in self.target_generator.named_parameters()}

    def is_closed(self) -> bool:
        """Whether the filters of the target generator are."""
        return not any(weight.any() for weight in self.target_generator.conv1d.parameters())

    def delta(self) -> torch.Tensor:
        """`[B, D, H]`: what all rows that stream have learnt, the fast weight minus W_0. Allocates it; for reports."""
        return self._streaming_state.fast.full_delta(self.config.learning_rate * self.config.target_gain)

    def delta_norm(self) -> torch.Tensor:
        """`[B]`: Frobenius norm of :meth:`delta`."""
        return self.delta().flatten(1).norm(dim=1)

    def initial_norm(self) -> torch.Tensor:
        """`[]`: Frobenius norm of W_0."""
        return self.w_down().norm()

    def known(self) -> list[float | None] | None:
        """Of the delta rule alone, while it streams."""
        state = self._streaming_state
        if state is None or not isinstance(state.fast, ResidualFastWeight):
            return None
        return [share if math.isfinite(share) else None for share in state.fast.known_share().tolist()]

    def stats(self) -> dict[str, Any]:
        """`known`, `conv_norm`, `W_target_norm`: see :func:`moshi_patch.ttt_stats`."""
        weights = self.target_generator.conv1d.conv.weight, self.target_generator.W_target.weight
        conv, projection = (weight.float().norm().item() for weight in weights)
        return {"known": self.known(), "conv_norm": conv, "W_target_norm": projection}

    def reported_weights(self) -> dict[str, list[nn.Parameter]]:
        """`conv_norm` and `W_target_norm`, of the target generator; `initial_norm`, of W_down."""
        generator, linear = self.target_generator, self.linear_out
        base = next((module.frozen_W for module in linear.modules() if isinstance(module, LoRALinear)), linear)
        modules = {"conv_norm": generator.conv1d, "W_target_norm": generator.W_target, "initial_norm": base}
        return {name: list(module.parameters()) for name, module in modules.items()}

    def watch_one_pass(self, keep: Callable[[torch.Tensor], None]) -> list[RemovableHandle]:
        """From Gram matrices: the delta itself is never built."""
        hidden: list[torch.Tensor] = []

        def keep_hidden(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            hidden[:] = [inputs[0][:1].detach()]

        def keep_norm(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            keep(one_pass_delta_norm(hidden.pop(), output[:1].detach(), self.config)[0])

        return [
            self.linear_out.register_forward_hook(keep_hidden),
            self.target_generator.register_forward_hook(keep_norm),
        ]

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


def one_pass_delta_norm(z: torch.Tensor, v: torch.Tensor, config: TTTConfig) -> torch.Tensor:
    """`[B]`, at least float32: Frobenius norm of what one pass has taught the fast weight when its last chunk begins.

    Args:
        z: `[B, T, H]`, what enters the down projection.
        v: `[B, T', D]`, the target generator's output: T' is a multiple of C.
        config: of the layer.
    """
    names = ("chunk_size", "learning_rate", "update", "target_gain", "delta_clip", "decay")
    return delta_norm(z, v, **{name: getattr(config, name) for name in names})
