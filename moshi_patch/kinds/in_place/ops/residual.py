"""One pass with the residual update: chunk-causal linear attention over whitened keys, chunk after chunk.

Shapes: `B` rows, `T` steps, `W` steps whose chunks make an update, `D` width, `H` hidden width, `C` chunk size.

With M from `ops.whiten`, `Y = M Z` and `F = M R` of each chunk, the update of a chunk is `Fᵀ Y`, so what the fast
weight answers is `D_c = Σ_{i<c} γ^(c-1-i) (Z_c Y_iᵀ) F_i`: as in `ops.dual`, with Y for keys and F for values. But what
is missing, `R_c = U_c - γ D_c` with targets U, needs the answers: F is only known once all earlier chunks are done.

Chunks shorter than a block of queries share one. Inside a block with the masked and weighed scores P and the block
diagonal M, `F = M (U - γ (D' + P F))`, D' being the answer of earlier blocks: one unit triangular system.
"""

from typing import NamedTuple

import torch

from .blocks import Blocks, matmul_
from .whiten import whitening


class Pass(NamedTuple):
    """What one pass leaves.

    Attributes:
        answers: `[B, T, D]`, what the fast weight answered.
        keys: `[B, W, H]`, Y.
        values: `[B, W, D]`, F. The sum of `Fᵀ Y` over chunks, weighed by γ^age, is the delta.
        whitening: `[B, W / C, C, C]`, M.
    """

    answers: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    whitening: torch.Tensor


def residual_pass(
    z: torch.Tensor,
    targets: torch.Tensor,
    before: torch.Tensor | None,
    chunk_size: int,
    learning_rate: float,
    decay: float,
    scores: torch.Tensor | None = None,
) -> Pass:
    """Answer and update over T steps, from a stream's beginning or from `before`. No gradients.

    Args:
        z: `[B, T, H]`, not float16.
        targets: `[B, W, D]`, U, the targets times their gain; W a multiple of C.
        before: `[B, T, D]`, what an earlier delta answers, decayed once per chunk begun since; None for zero.
        chunk_size, learning_rate, decay: as in :func:`naive`.
        scores: `[B, T, W]`, is filled with P, where one step sees another.
    """
    batch, steps, _ = z.shape
    written, width = targets.shape[1], targets.shape[2]
    blocks = Blocks(steps, chunk_size, decay, z, written)
    answers = z.new_zeros(batch, steps, width) if before is None else before.to(z.dtype).clone()
    keys, values = torch.empty_like(z[:, :written]), torch.empty_like(targets)
    scores = z.new_empty(batch, steps, written) if scores is None else scores
    matrices = []
    for start, end, seen in blocks:
        own = slice(start, min(end, written))
        if own.stop > start:
            chunks = z[:, own].unflatten(1, (-1, chunk_size))
            matrices.append(whitening(chunks, learning_rate))
            keys[:, own] = (matrices[-1] @ chunks.to(matrices[-1].dtype)).flatten(1, 2)
        if seen:
            block = scores[:, start:end, :seen]
            matmul_(block, z[:, start:end], keys[:, :seen].transpose(1, 2))
            blocks.mask_(block, start, end, seen)
            matmul_(answers[:, start:end], block[:, :, :start], values[:, :start], add=True)
        if own.stop > start:
            missing = (targets[:, own] - decay * answers[:, own]).to(matrices[-1].dtype)
            white = (matrices[-1] @ missing.unflatten(1, (-1, chunk_size))).flatten(1, 2)
            if seen > start:
                white = _solve(matrices[-1], scores[:, own, own], white, decay)
            values[:, own] = white
            if seen > start:
                matmul_(answers[:, start:end], scores[:, start:end, own], values[:, own], add=True)
    whole = torch.cat(matrices, 1) if matrices else z.new_empty(batch, 0, chunk_size, chunk_size)
    return Pass(answers, keys, values, whole)


def _solve(matrix: torch.Tensor, scores: torch.Tensor, right: torch.Tensor, decay: float, transposed=False):
    """`(I + γ M P)⁻¹ right`, or of the transpose, in one block of chunks: P `[B, N, N]`, M `[B, N / C, C, C]`."""
    size = matrix.shape[-1]
    coupling = decay * (matrix @ scores.to(matrix.dtype).unflatten(1, (-1, size))).flatten(1, 2)
    if transposed:
        return torch.linalg.solve_triangular(coupling.mT, right, upper=True, unitriangular=True)
    return torch.linalg.solve_triangular(coupling, right, upper=False, unitriangular=True)


class ResidualChunkCausal(torch.autograd.Function):
    """`base` plus the answers of :func:`residual_pass`, and its Y and F.

    The update of a chunk, `U = Rᵀ A⁻¹ Z = Fᵀ Y`, is all that others see of it. With `dY = F dU` and `dF = Y dUᵀ` as in
    linear attention, `dR = Mᵀ dF` and `dZ = Mᵀ dY - (S + Sᵀ) Z` with `S = Mᵀ F dRᵀ`.
    """

    @staticmethod
    def forward(ctx, base, z, targets, before, chunk_size, learning_rate, decay):
        scores = z.new_empty(z.shape[0], z.shape[1], targets.shape[1])
        done = residual_pass(z, targets, before, chunk_size, learning_rate, decay, scores)
        ctx.save_for_backward(z, done.keys, done.values, done.whitening, scores)
        ctx.blocks = Blocks(z.shape[1], chunk_size, decay, z, targets.shape[1])
        ctx.set_materialize_grads(False)
        return done.answers.add_(base), done.keys, done.values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_keys, grad_values):
        z, keys, values, matrices, scores = ctx.saved_tensors
        blocks = ctx.blocks
        grad = torch.zeros_like(z[:, :, :1]).expand(-1, -1, values.shape[2]) if grad is None else grad
        answers = grad.clone()  # the gradient to the answers: they are added to the output and missing from the rest
        missing = _grad_missing(blocks, answers, grad_values, matrices, scores)
        grad_z, grad_keys = _grad_scores(blocks, z, keys, values, answers, grad_keys)
        size = blocks.chunk_size
        for start in range(0, blocks.keys, size):
            part = slice(start, start + size)
            matrix = matrices[:, start // size]
            inner = matrix.mT @ (values[:, part] @ missing[:, part].mT).to(matrix.dtype)
            factors = torch.cat([matrix.mT, -(inner + inner.mT)], 2).to(z.dtype)
            matmul_(grad_z[:, part], factors, torch.cat([grad_keys[:, part], z[:, part]], 1), add=True)
        return grad, grad_z, missing, answers if ctx.needs_input_grad[3] else None, None, None, None


def _grad_missing(blocks, answers, grad_values, matrices, scores) -> torch.Tensor:
    """The gradient to R, `[B, W, D]`, from the last block to the first; completes `answers`, that to D, in place."""
    size, decay = blocks.chunk_size, blocks.decay
    missing = torch.empty_like(answers[:, : blocks.keys])
    for start, end, seen in reversed(list(blocks)):
        own = slice(start, min(end, blocks.keys))
        if own.stop <= start:
            continue
        white = torch.zeros_like(missing[:, own]) if grad_values is None else grad_values[:, own].clone()
        first = start if seen > start else end  # whether steps of the block see others of it
        matmul_(white, scores[:, first:, own].mT, answers[:, first:], add=True)
        matrix = matrices[:, start // size : own.stop // size]
        white = white.to(matrix.dtype)
        if seen > start:
            white = _solve(matrix, scores[:, own, own], white, decay, transposed=True)
        missing[:, own] = (matrix.mT @ white.unflatten(1, (-1, size))).flatten(1, 2)
        answers[:, own] -= decay * missing[:, own]
    return missing


def _grad_scores(blocks, z, keys, values, answers, grad_keys) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients to z as queries, `[B, T, H]`, and to Y, `[B, W, H]`, through the scores."""
    grad_z = torch.zeros_like(z)
    grad_keys = torch.zeros_like(keys) if grad_keys is None else grad_keys.clone()
    grad_scores = z.new_empty(len(z), z.shape[1], blocks.keys)
    for start, end, seen in blocks:
        if seen:
            block = grad_scores[:, start:end, :seen]
            matmul_(block, answers[:, start:end], values[:, :seen].mT)
            blocks.mask_(block, start, end, seen)
            matmul_(grad_z[:, start:end], block, keys[:, :seen])
    for start in range(0, blocks.keys, blocks.size):
        own = slice(start, min(start + blocks.size, blocks.keys))
        first = start if blocks.per_block > 1 else own.stop
        matmul_(grad_keys[:, own], grad_scores[:, first:, own].mT, z[:, first:], add=True)
    return grad_z, grad_keys
