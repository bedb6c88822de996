"""`TTTMLP`: an MLP per head between the attention and the MLP of a Moshi layer, which keeps learning from the stream.

Shapes: `B` rows, `T` steps, `D` model width, `h` heads, `d = D / h` head width, `C` mini-batch size.

It reads x, the residual stream after self-attention and cross-attention, and m(x) takes its place: x and, through a
gate, what the inner MLP of each head answers. The stock norm and MLP follow. Everything between the projections into
the heads and the one out of them is computed in float32 at least, whatever the weights' dtype, and no forward pass ever
writes a parameter.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from moshi.modules.transformer import StreamingTransformerLayer
from torch import nn
from torch.utils.hooks import RemovableHandle

from ...call import LayerCall, current_call
from ...config import TTTConfig
from ..memory import TTTMemory, TTTState
from ..weights import NewWeights
from .ops import MLPFastWeight, MLPWeights, dual, segment_, step_

EXPANSION = 4
"""Hidden width of the inner MLP over d."""

STD = 0.02
"""Of what weights begin with."""

FAST_KEYS = ("W1", "b1", "W2", "b2")
OWN_KEYS = (
    *FAST_KEYS,
    "ttt_norm_weight",
    "ttt_norm_bias",
    "learnable_ttt_lr_weight",
    "learnable_ttt_lr_bias",
    "gating_alpha",
)
PROJECTIONS = ("wq", "wk", "wv", "wo")
DECAYED_KEYS = ("W1", "W2", "learnable_ttt_lr_weight", *(f"{name}.weight" for name in PROJECTIONS))
"""What begins at random about zero. Biases, gains and the gate are left alone by weight decay."""


class Projection(NewWeights):
    """`weight [D, D]` and `bias [D]`, like an `nn.Linear` that LoRA and int8 leave alone."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.dim = dim
        self.add_weights(("weight", "bias"), device, dtype)

    def initial(self, name: str, device, dtype) -> torch.Tensor:
        """Normal with standard deviation 0.02, and zeros."""
        if name == "weight":
            return _normal((self.dim, self.dim), device, dtype)
        return torch.zeros(self.dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., D]` to `[..., D]` in the weight's dtype."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class PostNorm(NewWeights):
    """A layer norm over D, in the dtype of its input."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.dim = dim
        self.add_weights(("weight", "bias"), device, dtype)

    def initial(self, name: str, device, dtype) -> torch.Tensor:
        """Ones and zeros."""
        return torch.full((self.dim,), float(name == "weight"), device=device, dtype=dtype)

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        """`[..., D]`."""
        return F.layer_norm(y, (self.dim,), self.weight.to(y.dtype), self.bias.to(y.dtype), eps=1e-6)


class TTTMLP(TTTMemory, NewWeights):
    """Stands in `layer.ttt` of a stock layer.

    Args:
        dim, heads: D and h, of the transformer.
        config: the TTT settings.
        device, dtype: of the weights.

    Attributes:
        W1, b1, W2, b2: `[h, d, 4d]`, `[h, 1, 4d]`, `[h, 4d, d]`, `[h, 1, d]`, what the fast weights of a row begin as.
        ttt_norm_weight, ttt_norm_bias: `[h, d]`, of the norm behind the inner MLP.
        learnable_ttt_lr_weight, learnable_ttt_lr_bias: `[h, 1, D]`, `[h, 1]`, of each step's learning rate.
        wq, wk, wv, wo, post_norm: modules with a `weight` and a `bias`.
        gating_alpha: `[D]`; tanh of it is the gate.
    """

    place = "ttt"
    weight_keys = (
        *OWN_KEYS,
        *(f"{name}.{key}" for name in (*PROJECTIONS, "post_norm") for key in ("weight", "bias")),
    )
    undecayed_keys = tuple(key for key in weight_keys if key not in DECAYED_KEYS)
    answers_untaught = True

    def __init__(self, dim: int, heads: int, config: TTTConfig, device=None, dtype=None):
        super().__init__(config)
        self.dim, self.heads, self.width = dim, heads, dim // heads
        self.add_weights(OWN_KEYS, device, dtype)
        for name in PROJECTIONS:
            self.add_module(name, Projection(dim, device, dtype))
        self.post_norm = PostNorm(dim, device, dtype)
        self._watching: OrderedDict[int, Callable[[torch.Tensor], None]] = OrderedDict()

    @property
    def update_steps(self) -> int:
        """The mini-batch size."""
        return self.config.mini_batch_size

    @property
    def quiet_steps(self) -> int:
        """None: each step reads its own update."""
        return 0

    @classmethod
    def needs_x0(cls, config: TTTConfig) -> bool:
        """No: it learns from the layer's own x."""
        return False

    @classmethod
    def check_model(cls, config: TTTConfig, arguments: Mapping[str, Any]) -> None:
        """That the width can be split among the heads."""
        dim, heads = arguments["dim"], arguments["num_heads"]
        if not all(type(number) is int and number > 0 for number in (dim, heads)) or dim % heads:
            raise ValueError(
                f'num_heads={heads!r}: must be a whole number that divides dim={dim!r}, with ttt_kind="mlp", which has '
                "an MLP per head."
            )

    @classmethod
    def add_to(cls, layer: StreamingTransformerLayer, config: TTTConfig, device=None, dtype=None) -> "TTTMLP":
        """As `layer.ttt`. The layer keeps its class: FSDP's wrap policy asks for it."""
        attention = layer.self_attn
        layer.ttt = cls(attention.embed_dim, attention.num_heads, config, device=device, dtype=dtype)
        layer._ff_block = MethodType(_with_memory, layer)
        return layer.ttt

    def initial(self, name: str, device, dtype) -> torch.Tensor:
        """What a tensor of this module's own begins as."""
        heads, width, hidden = self.heads, self.width, EXPANSION * self.width
        if name in ("W1", "W2", "learnable_ttt_lr_weight"):
            shapes = {"W1": (heads, width, hidden), "W2": (heads, hidden, width)}
            return _normal(shapes.get(name, (heads, 1, self.dim)), device, dtype)
        shapes = {
            "b1": (heads, 1, hidden),
            "b2": (heads, 1, width),
            "learnable_ttt_lr_bias": (heads, 1),
            "gating_alpha": (self.dim,),
        }
        values = {"ttt_norm_weight": 1.0, "gating_alpha": self.config.initial_gating_alpha}
        return torch.full(shapes.get(name, (heads, width)), values.get(name, 0.0), device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """m(x): `[B, T, D]` to `[B, T, D]` in the dtype of x.

        While streaming, the state advances by T steps and gradients do not flow through what is learnt.
        """
        call = current_call.get()
        if self._streaming_state is not None:
            return self._stream(self._streaming_state, x)
        return x if self._bypassed(call) else x + self._answer(self._one_pass(x, call)).to(x.dtype)

    def _inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, k, v `[B, h, T, d]` and η `[B, h, T]`, at least float32."""
        wide = torch.promote_types(x.dtype, torch.float32)

        def heads(projection: nn.Module) -> torch.Tensor:
            return projection(x).to(wide).unflatten(-1, (self.heads, self.width)).transpose(1, 2)

        q, k, v = F.normalize(heads(self.wq), dim=-1), F.normalize(heads(self.wk), dim=-1), heads(self.wv)
        weight, bias = self.learnable_ttt_lr_weight[:, 0].to(wide), self.learnable_ttt_lr_bias[:, 0].to(wide)
        share = torch.sigmoid(F.linear(x.to(wide), weight, bias)).transpose(1, 2)
        return q, k, v, share * (self.config.base_lr / (self.width * self.config.mini_batch_size))

    def _weights(self) -> MLPWeights:
        return MLPWeights(self.W1, self.b1, self.W2, self.b2, self.ttt_norm_weight, self.ttt_norm_bias)

    def _answer(self, y: torch.Tensor) -> torch.Tensor:
        """What is added to x: `[B, T, D]` of what the heads answered, `[B, h, T, d]`."""
        return torch.tanh(self.gating_alpha) * self.wo(self.post_norm(y.transpose(1, 2).flatten(2)))

    def _one_pass(self, x: torch.Tensor, call: LayerCall | None) -> torch.Tensor:
        q, k, v, eta = self._inputs(x)
        eta = torch.zeros_like(eta) if self._muted(call) else eta
        group = self.config.scan_checkpoint_group_size or None
        y, delta = dual(self._weights(), q, k, v, eta, self.config.mini_batch_size, group_size=group)
        with torch.no_grad():  # a layer that is computed again must save for backward what it did the first time
            for keep in self._watching.values():
                keep(delta.norm()[0])
        return y

    def _stream(self, state: TTTState, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            inputs, options = self._inputs(x), {"enabled": self._enabled, "learning": state.learning}
            if self._worth_a_segment(x.shape[1]):
                y = segment_(state.fast, self._weights(), *inputs, state.exec_mask, **options)
            else:  # the only one that a CUDA graph replays
                steps = zip(*(part.unbind(2) for part in inputs), strict=True)
                weights = MLPWeights(*(weight.to(inputs[0].dtype) for weight in self._weights()))
                y = torch.stack([step_(state.fast, weights, *step, state.exec_mask, **options) for step in steps], 2)
        return torch.where(self._answering, x + self._answer(y).to(x.dtype), x)

    def _fresh(self, batch_size: int, device: torch.device) -> MLPFastWeight:
        size, hidden = self.config.mini_batch_size, EXPANSION * self.width
        return MLPFastWeight.allocate(batch_size, self.heads, self.width, hidden, size, self.W1.dtype, device)

    def new_parameters(self) -> dict[str, nn.Parameter]:
        """All of this module's."""
        return dict(self.named_parameters())

    def is_closed(self) -> bool:
        """Whether the gate is."""
        return not self.gating_alpha.any()

    def delta_norm(self) -> torch.Tensor:
        """`[B]`: Frobenius norm of what W1, b1, W2 and b2 of all heads have become more than they were."""
        return self._streaming_state.fast.full_delta().norm()

    def initial_norm(self) -> torch.Tensor:
        """`[]`: Frobenius norm of W1, b1, W2 and b2."""
        parts = [part.to(torch.promote_types(part.dtype, torch.float32)).norm() for part in self._weights()[:4]]
        return torch.stack(parts).norm()

    def stats(self) -> dict[str, Any]:
        """`known`, which is None, `gating_alpha_norm` and `wo_norm`: see :func:`moshi_patch.ttt_stats`."""
        norms = {"gating_alpha_norm": self.gating_alpha, "wo_norm": self.wo.weight}
        return {"known": self.known()} | {name: weight.float().norm().item() for name, weight in norms.items()}

    def reported_weights(self) -> dict[str, list[nn.Parameter]]:
        """`gating_alpha_norm` and `wo_norm`; `initial_norm`, of W1, b1, W2 and b2."""
        fast = [getattr(self, name) for name in FAST_KEYS]
        return {"gating_alpha_norm": [self.gating_alpha], "wo_norm": [self.wo.weight], "initial_norm": fast}

    def watch_one_pass(self, keep: Callable[[torch.Tensor], None]) -> list[RemovableHandle]:
        """The pass has the delta anyway."""
        handle = RemovableHandle(self._watching)
        self._watching[handle.id] = keep
        return [handle]


def _with_memory(layer: StreamingTransformerLayer, x: torch.Tensor) -> torch.Tensor:
    """The feed-forward block of the layer's own class, on m(x)."""
    return type(layer)._ff_block(layer, layer.ttt(x))


def _normal(shape: tuple[int, ...], device, dtype) -> torch.Tensor:
    return (STD * torch.randn(shape, device=device)).to(dtype or torch.get_default_dtype())
