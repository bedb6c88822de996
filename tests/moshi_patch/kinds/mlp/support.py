"""Weights and inputs of a small inner MLP, in which nothing is zero by chance."""

import torch
from torch.nn import functional as F

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
