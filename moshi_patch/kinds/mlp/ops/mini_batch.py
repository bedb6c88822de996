"""The inner MLP of TTT-MLP and what one mini-batch does with it: gradients, causal reads, the update.

Shapes: `B` rows, `h` heads, `d` head width, `n` hidden width (4d), `C` steps of a mini-batch.

A bias is the weight of an input that is always one. So the two layers are `[d + 1, n]` and `[n + 1, d]` here, inputs
end with a one, and a bias needs no line of its own.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

EPSILON = 1e-6
"""Of the layer norm behind the inner MLP."""


class MLPWeights(NamedTuple):
    """The learnt tensors that one pass or one step reads, of all heads, in any dtype.

    Attributes:
        W1, b1: `[h, d, n]` and `[h, 1, n]`, first layer at the beginning of a stream.
        W2, b2: `[h, n, d]` and `[h, 1, d]`, second layer at the beginning of a stream.
        norm_weight, norm_bias: `[h, d]`, of the layer norm behind it; they are no fast weights.
    """

    W1: torch.Tensor
    b1: torch.Tensor
    W2: torch.Tensor
    b2: torch.Tensor
    norm_weight: torch.Tensor
    norm_bias: torch.Tensor


class MLPDelta(NamedTuple):
    """What rows have learnt: fast weights minus `MLPWeights`, `[B, *]` each, the shapes of W1, b1, W2 and b2."""

    W1: torch.Tensor
    b1: torch.Tensor
    W2: torch.Tensor
    b2: torch.Tensor

    def norm(self) -> torch.Tensor:
        """`[B]`: Frobenius norm over all four."""
        return torch.stack([part.flatten(1).norm(dim=1) for part in self]).norm(dim=0)


class Layers(NamedTuple):
    """The two layers with their biases as a last input row: `[B, h, d + 1, n]` and `[B, h, n + 1, d]`."""

    first: torch.Tensor
    second: torch.Tensor

    def split(self) -> MLPDelta:
        """The same as four tensors: views."""
        first, second = self
        return MLPDelta(first[:, :, :-1], first[:, :, -1:], second[:, :, :-1], second[:, :, -1:])


class Norm(NamedTuple):
    """Weight and bias of the heads' layer norms, `[h, 1, d]` each."""

    weight: torch.Tensor
    bias: torch.Tensor


class Entries(NamedTuple):
    """What steps of a mini-batch teach: its updates are minus the sums of `inputsᵀ gradients` of each layer.

    Attributes:
        keys: `[B, h, C, d + 1]`, inputs of the first layer.
        hidden: `[B, h, C, n + 1]`, inputs of the second.
        grad1, grad2: `[B, h, C, n]` and `[B, h, C, d]`, gradients to the layers' outputs, times η.
    """

    keys: torch.Tensor
    hidden: torch.Tensor
    grad1: torch.Tensor
    grad2: torch.Tensor


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that the inner MLP is computed in: that of `tensor`, float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def layers_of(weights: MLPWeights, dtype: torch.dtype) -> Layers:
    """The layers of one row, `[1, h, *]`, at the beginning of a stream."""
    first, second = torch.cat([weights.W1, weights.b1], 1), torch.cat([weights.W2, weights.b2], 1)
    return Layers(first.to(dtype)[None], second.to(dtype)[None])


def norm_of(weights: MLPWeights, dtype: torch.dtype) -> Norm:
    return Norm(weights.norm_weight.to(dtype)[:, None], weights.norm_bias.to(dtype)[:, None])


def with_one(inputs: torch.Tensor) -> torch.Tensor:
    """`[..., m]` to `[..., m + 1]`: the bias's input behind the others."""
    return F.pad(inputs, (0, 1), value=1.0)


def gelu(z: torch.Tensor) -> torch.Tensor:
    return F.gelu(z, approximate="tanh")


def through_gelu(gradient: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """The gradient to `z` from that to `gelu(z)`; autograd goes through it again."""
    return torch.ops.aten.gelu_backward(gradient, z, approximate="tanh")


def normalised(z: torch.Tensor, norm: Norm) -> torch.Tensor:
    return norm.weight * F.layer_norm(z, z.shape[-1:], eps=EPSILON) + norm.bias


def loss_gradient(z: torch.Tensor, k: torch.Tensor, v: torch.Tensor, norm: Norm) -> torch.Tensor:
    """The gradient of `½ ‖LN(z) - LN(v - k)‖²` to `z`, the inner MLP's output at `k`; all `[B, h, C, d]`."""
    centred = z - z.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    unit = centred * scale
    error = norm.weight * (norm.weight * (unit - F.layer_norm(v - k, v.shape[-1:], eps=EPSILON)))
    along = (error * unit).mean(-1, keepdim=True)
    return scale * (error - error.mean(-1, keepdim=True) - unit * along)


def mini_batch(
    layers: Layers,
    norm: Norm,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eta: torch.Tensor,
    held: tuple[torch.Tensor, Entries] | None = None,
) -> tuple[torch.Tensor, Entries]:
    """One mini-batch: the gradients of its steps at `layers`, and what each step reads after its own update.

    Args:
        layers: at the mini-batch's start.
        q, k, v: `[B, h, C, d]`; of a last mini-batch, or one alone, C may be any number.
        eta: `[B, h, C]`.
        held: `[B, 1, C, 1]` bool, and entries that stand instead of the computed ones where it is true.
    Returns:
        `[B, h, C, d]` and the entries.
    """
    steps = k.shape[2]
    keys, queries = with_one(k), with_one(q)
    z1, z1_read = (torch.cat([keys, queries], 2) @ layers.first).split(steps, 2)
    hidden = with_one(gelu(z1))
    grad2 = loss_gradient(hidden @ layers.second, k, v, norm)
    grad1 = through_gelu(grad2 @ layers.second[:, :, :-1].transpose(2, 3), z1)
    entries = Entries(keys, hidden, eta[..., None] * grad1, eta[..., None] * grad2)
    if held is not None:
        entries = Entries(*(torch.where(held[0], old, new) for old, new in zip(held[1], entries, strict=True)))

    seen = (queries @ entries.keys.transpose(2, 3)).tril()
    hidden_read = with_one(gelu(z1_read - seen @ entries.grad1))
    seen = (hidden_read @ entries.hidden.transpose(2, 3)).tril()
    return q + normalised(hidden_read @ layers.second - seen @ entries.grad2, norm), entries


def learnt(layers: Layers, entries: Entries) -> Layers:
    """The layers after the steps in `entries`."""
    return Layers(
        layers.first - entries.keys.transpose(2, 3) @ entries.grad1,
        layers.second - entries.hidden.transpose(2, 3) @ entries.grad2,
    )
