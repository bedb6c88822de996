"""One pass over many steps: In-Place TTT as chunk-causal linear attention, for training, evaluation and scoring.

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width, `C` chunk size, `n = ceil(T / C)` chunks.

The fast weight is an additive delta, so `o_t = base_t + η Σ_{chunk(j) < chunk(t)} (z_j · z_t) v_j` with
`base = linear_out(z)`: linear attention with keys = queries = z and values = v whose mask is strictly lower
triangular in chunks. No `[n, B, D, H]` tensor is ever built. The last chunk's v is never needed.
"""

import torch

from .blocks import Blocks, matmul_
from .residual import ResidualChunkCausal

SEGMENT_STEPS = 2048
"""Steps per segment once carrying a delta between segments costs fewer operations than attending to everything."""


def dual(
    base: torch.Tensor,
    z: torch.Tensor,
    v: torch.Tensor,
    chunk_size: int,
    learning_rate: float,
    *,
    update: str = "hebbian",
    target_gain: float = 1.0,
    delta_clip: float | None = None,
    decay: float = 1.0,
    delta: torch.Tensor | None = None,
) -> torch.Tensor:
    """`base` plus what the fast weight adds, equal to :func:`naive` with `base = z @ w_down.T`.

    Args:
        base: `[B, T, D]`, the output of the stock down projection.
        z: `[B, T, H]`.
        v: `[B, T', D]`, targets of the first T' steps: all full chunks but a last one nobody needs, i.e.
            `T' >= (ceil(T / C) - 1) * C`.
        chunk_size, learning_rate, update, target_gain, delta_clip, decay: as in :func:`naive`.
        delta: `[B, D, H]`, what came before; None at the start of a stream.
    Returns:
        `[B, T, D]` in the dtype of `base`.
    """
    if z.dtype == torch.float16:  # z·z sums H products and leaves float16's range
        z, v = z.float(), v.float()
    v = v[:, : z.shape[1]].to(z.dtype)
    rate = learning_rate * target_gain
    if update == "residual":
        v = target_gain * v if target_gain != 1.0 else v
    elif delta_clip is not None:
        v = clip_chunks(z, v, chunk_size, rate, delta_clip)
    outs = []
    segment = segment_steps(z.shape[1], v.shape[2], z.shape[2], chunk_size)
    for start in range(0, z.shape[1], segment):
        part = slice(start, start + segment)
        base_part, z_part, v_part = base[:, part], z[:, part], v[:, part]
        before = None if delta is None else apply_earlier(delta, z_part, chunk_size, decay)
        if update == "residual":
            out, keys, values = _residual(base_part, z_part, v_part, before, chunk_size, learning_rate, decay)
        else:
            keys, values = z_part, v_part
            base_part = base_part if before is None else base_part + before.to(base.dtype)
            out = _chunk_causal(base_part, z_part, v_part, chunk_size, rate, decay)
        outs.append(out)
        if start + segment < z.shape[1]:
            delta = updated(delta, keys, values, chunk_size, 1.0 if update == "residual" else rate, decay)
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def segment_steps(steps: int, width: int, hidden: int, chunk_size: int) -> int:
    """Steps per segment, in full chunks: all at once while `T (D + H) <= 4 D H`, below about 12,000 steps in Moshi."""
    if steps * (width + hidden) <= 4 * width * hidden:
        return steps + chunk_size
    return max(1, SEGMENT_STEPS // chunk_size) * chunk_size


def clip_chunks(
    z: torch.Tensor, v: torch.Tensor, chunk_size: int, learning_rate: float, delta_clip: float
) -> torch.Tensor:
    """Scale each full chunk of `v` so that its update `η Σ v zᵀ` has a Frobenius norm of at most `delta_clip`.

    The norm comes from Gram matrices, `‖Σ v zᵀ‖² = Σ_ij (v_i · v_j)(z_i · z_j)`, so no `[D, H]` tensor is built.
    """
    full = v.shape[1] // chunk_size * chunk_size
    if not full:
        return v
    z_c = z[:, :full].unflatten(1, (-1, chunk_size))
    v_c = v[:, :full].unflatten(1, (-1, chunk_size))
    wide = torch.promote_types(z.dtype, torch.float32)
    narrow = z.dtype if z.dtype != torch.float16 else wide  # z·z leaves float16's range
    z_n, v_n = z_c.to(narrow), v_c.to(narrow)
    gram = (z_n @ z_n.transpose(2, 3)).to(wide) * (v_n @ v_n.transpose(2, 3)).to(wide)
    square = learning_rate**2 * gram.sum((2, 3))
    over = square > delta_clip**2
    # The inner `where` keeps the square root away from 0, whose infinite derivative would turn a masked 0 into NaN.
    scale = torch.where(over, delta_clip * torch.where(over, square, 1.0).rsqrt(), 1.0).to(v.dtype)
    return torch.cat([(v_c * scale[:, :, None, None]).flatten(1, 2), v[:, full:]], 1)


def apply_earlier(delta: torch.Tensor, z: torch.Tensor, chunk_size: int, decay: float) -> torch.Tensor:
    """`[B, T, D]`: what an earlier delta adds to the steps of a segment, decayed once per chunk begun since."""
    out = z @ delta.to(z.dtype).transpose(1, 2)
    if decay != 1.0:
        chunk = torch.arange(z.shape[1], device=z.device) // chunk_size
        out = out * (decay ** chunk.double()).to(out.dtype)[:, None]
    return out


def updated(
    delta: torch.Tensor | None, z: torch.Tensor, v: torch.Tensor, chunk_size: int, learning_rate: float, decay: float
) -> torch.Tensor:
    """The delta `[B, D, H]` after the full chunks in `z`, accumulated in at least float32."""
    chunks = z.shape[1] // chunk_size
    if decay != 1.0:
        age = chunks - 1 - torch.arange(z.shape[1], device=z.device) // chunk_size
        v = v * (decay ** age.double()).to(v.dtype)[:, None]
    update = learning_rate * (v.transpose(1, 2) @ z).to(torch.promote_types(z.dtype, torch.float32))
    return update if delta is None else decay**chunks * delta + update


def _chunk_causal(base, z, v, chunk_size, learning_rate, decay):
    if z.shape[1] <= chunk_size:
        return base
    return _ChunkCausal.apply(base.to(z.dtype), z, v, chunk_size, learning_rate, decay).to(base.dtype)


def _residual(base, z, v, before, chunk_size, learning_rate, decay):
    """The outputs, and keys and values whose products are the chunks' updates."""
    targets = v[:, : v.shape[1] // chunk_size * chunk_size]
    if before is None and not targets.shape[1]:
        return base, z[:, :0], targets
    out, keys, values = ResidualChunkCausal.apply(
        base.to(z.dtype), z, targets, before, chunk_size, learning_rate, decay
    )
    return out.to(base.dtype), keys, values


def _sees_keys(block: tuple[int, int, int]) -> bool:
    return block[2] > 0


class _ChunkCausal(torch.autograd.Function):
    """`base + η (mask ∘ z zᵀ) v`, and each gradient written by one matrix product per block.

    Saved for backward: z, v and the scores `[B, T, keys]`. `base` needs not be kept, as it enters by addition alone.
    """

    @staticmethod
    def forward(ctx, base, z, v, chunk_size, learning_rate, decay):
        blocks = Blocks(z.shape[1], chunk_size, decay, z, (z.shape[1] - 1) // chunk_size * chunk_size)
        out = base.clone()  # not in place: hooks and wrappers of the down projection may hold its output
        scores = z.new_empty(z.shape[0], z.shape[1], blocks.keys)
        for start, end, keys in filter(_sees_keys, blocks):
            block = scores[:, start:end, :keys]
            matmul_(block, z[:, start:end], z[:, :keys].transpose(1, 2))
            blocks.mask_(block, start, end, keys)
            matmul_(out[:, start:end], block, v[:, :keys], alpha=learning_rate, add=True)
        ctx.save_for_backward(z, v, scores)
        ctx.blocks, ctx.learning_rate = blocks, learning_rate
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        z, v, scores = ctx.saved_tensors
        blocks, rate = ctx.blocks, ctx.learning_rate
        grad_z = torch.empty_like(z)
        grad_v = torch.empty_like(v)
        grad_scores = torch.empty_like(scores)
        done = 0
        for start, end, keys in filter(_sees_keys, blocks):
            block = grad_scores[:, start:end, :keys]
            matmul_(block, grad[:, start:end], v[:, :keys].transpose(1, 2), alpha=rate)
            blocks.mask_(block, start, end, keys)
            grad_z[:, done:start] = 0.0
            matmul_(grad_z[:, start:end], block, z[:, :keys])
            done = end
        # Keys: one product per key block over all later queries, so that nothing is summed in low precision except
        # the two roles z plays. In a block of several chunks the queries of the block itself are among them.
        for first in range(0, blocks.keys, blocks.size):
            last = min(first + blocks.size, blocks.keys)
            query = first if blocks.per_block > 1 else first + blocks.size
            p, dp = scores[:, query:, first:last], grad_scores[:, query:, first:last]
            matmul_(grad_v[:, first:last], p.transpose(1, 2), grad[:, query:], alpha=rate)
            matmul_(grad_z[:, first:last], dp.transpose(1, 2), z[:, query:], add=True)
        grad_v[:, blocks.keys :] = 0.0
        return grad, grad_z, grad_v, None, None, None
