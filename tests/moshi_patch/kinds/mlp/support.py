"""Weights and inputs of a small inner MLP, in which nothing is zero by chance; the layer around it, written anew."""

import torch
from torch.nn import functional as F

from moshi_patch.kinds.mlp import TTTMLP
from moshi_patch.kinds.mlp.ops import MLPWeights

BATCH, HEADS, D = 4, 2, 6


def make_weights(heads: int = HEADS, width: int = D, seed: int = 0) -> MLPWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return std * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return MLPWeights(
        W1=normal(heads, width, 4 * width, std=0.3),
        b1=normal(heads, 1, 4 * width, std=0.3),
        W2=normal(heads, 4 * width, width, std=0.3),
        b2=normal(heads, 1, width, std=0.3),
        norm_weight=1 + normal(heads, width, std=0.3),
        norm_bias=normal(heads, width, std=0.3),
    )


def inputs(
    steps: int, batch: int = BATCH, heads: int = HEADS, width: int = D, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k of unit length, v and η, large enough that what is learnt matters."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, steps, width, generator=generator, dtype=torch.float64) for _ in range(3))
    eta = 0.3 * torch.rand(batch, heads, steps, generator=generator, dtype=torch.float64)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, eta


def specified_inputs(memory: TTTMLP, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v `[B, h, T, d]` and η `[B, h, T]` of `x [B, T, D]`, head by head."""
    width, parts = memory.width, []
    for head in range(memory.heads):
        rows = slice(head * width, (head + 1) * width)
        q, k, v = (x @ w.weight[rows].T + w.bias[rows] for w in (memory.wq, memory.wk, memory.wv))
        q, k = (u / u.norm(dim=-1, keepdim=True).clamp(min=1e-12) for u in (q, k))
        share = torch.sigmoid(x @ memory.learnable_ttt_lr_weight[head, 0] + memory.learnable_ttt_lr_bias[head, 0])
        parts.append((q, k, v, memory.config.base_lr * share / (width * memory.config.mini_batch_size)))
    return tuple(torch.stack(heads, 1) for heads in zip(*parts, strict=True))


def specified_answer(memory: TTTMLP, y: torch.Tensor) -> torch.Tensor:
    """What is added to x `[B, T, D]`, from `y [B, h, T, d]`."""
    y = torch.cat([y[:, head] for head in range(memory.heads)], -1)
    centred = y - y.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * memory.post_norm.weight
    y = (y + memory.post_norm.bias) @ memory.wo.weight.T + memory.wo.bias
    return memory.gating_alpha.tanh() * y
