"""The size of what one pass teaches the fast weight, without building it.

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width, `C` chunk size.
"""

import torch

from .dual import clip_chunks
from .residual import residual_pass


@torch.no_grad()
def delta_norm(
    z: torch.Tensor,
    v: torch.Tensor,
    chunk_size: int,
    learning_rate: float,
    *,
    update: str = "hebbian",
    target_gain: float = 1.0,
    delta_clip: float | None = None,
    decay: float = 1.0,
) -> torch.Tensor:
    """`[B]`, at least float32: Frobenius norm of the delta after the chunks in `v`, from a stream's beginning.

    It follows from Gram matrices, `‖Σ_t v_t z_tᵀ‖² = Σ_ij (v_i · v_j)(z_i · z_j)`.

    Args:
        z: `[B, T, H]`.
        v: `[B, T', D]`, targets of the first T' steps, a multiple of C.
        chunk_size, learning_rate, update, target_gain, delta_clip, decay: as in :func:`naive`.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    keys, values, rate = z[:, : v.shape[1]].to(wide), v.to(wide), learning_rate * target_gain
    if update == "residual":
        done = residual_pass(keys, target_gain * values, None, chunk_size, learning_rate, decay)
        keys, values, rate = done.keys, done.values, 1.0
    elif delta_clip is not None:
        values = clip_chunks(keys, values, chunk_size, rate, delta_clip)
    chunk = torch.arange(keys.shape[1], device=z.device) // chunk_size
    values = values * (decay ** (chunk.max() - chunk).double()).to(wide)[:, None] if len(chunk) else values
    square = ((keys @ keys.mT) * (values @ values.mT)).sum((1, 2))
    return rate * square.clamp(min=0.0).sqrt()
