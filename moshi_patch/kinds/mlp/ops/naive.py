"""The specification: TTT-MLP of Sun et al. 2024 (arXiv 2407.04620), step by step, in the dtype it is given.

Shapes: `B` rows, `h` heads, `T` steps, `d` head width, `n` hidden width (4d), `C` mini-batch size.
Slow on purpose: every fast path is tested against these functions, so they share no code with them. The inner
gradients are autograd's.
"""

import torch
from torch.nn import functional as F

from .mini_batch import MLPDelta, MLPWeights

Fast = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def naive(
    weights: MLPWeights, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, eta: torch.Tensor, mini_batch_size: int
) -> tuple[torch.Tensor, MLPDelta]:
    """`y_t = q_t + LN(f_{W_t}(q_t))`: each step reads what it and all before it taught.

    `W_t = W_s - Σ η_j ∇l_j(W_s)` over the steps j <= t of t's mini-batch, which began at W_s. The loss of a step is
    `l = ½ ‖LN(f_W(k)) - LN(v - k)‖²`.

    Args:
        weights: W at the beginning.
        q, k, v: `[B, h, T, d]`; q and k of unit length.
        eta: `[B, h, T]`, the learning rate of each step; 0 where it learns nothing.
        mini_batch_size: C, in steps.
    Returns:
        `[B, h, T, d]`, and what was learnt in all.
    """
    norm = weights.norm_weight[:, None], weights.norm_bias[:, None]
    beginning = tuple(part.expand(len(q), *part.shape) for part in weights[:4])
    gradients = torch.func.grad(_loss)
    now, outputs = beginning, []
    for t in range(q.shape[2]):
        if t % mini_batch_size == 0:
            start = now
        q_t, k_t, v_t = (part[:, :, t : t + 1] for part in (q, k, v))
        rate = eta[:, :, t, None, None]
        now = tuple(w - rate * g for w, g in zip(now, gradients(start, k_t, v_t, norm), strict=True))
        outputs.append(q_t + _layer_norm(_mlp(now, q_t), norm))
    return torch.cat(outputs, 2), MLPDelta(*(w - w_0 for w, w_0 in zip(now, beginning, strict=True)))


def _mlp(fast: Fast, u: torch.Tensor) -> torch.Tensor:
    w1, b1, w2, b2 = fast
    return F.gelu(u @ w1 + b1, approximate="tanh") @ w2 + b2


def _layer_norm(z: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    variance, mean = torch.var_mean(z, -1, correction=0, keepdim=True)
    return norm[0] * (z - mean) / torch.sqrt(variance + 1e-6) + norm[1]


def _loss(fast: Fast, k: torch.Tensor, v: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Summed over rows and heads, whose weights are each their own."""
    return 0.5 * (_layer_norm(_mlp(fast, k), norm) - _layer_norm(v - k, norm)).square().sum()
