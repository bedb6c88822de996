"""The residual update of one chunk, in a form that low precision does not spoil.

Shapes: `*` batch, `C` chunk size, `D` model width, `H` hidden width.

Keys Z and what is missing R make the update `Rᵀ A⁻¹ Z` with `A = Z Zᵀ + diag(ρ)`. Where keys repeat, A is nearly
singular and `A⁻¹ R` has large parts that must cancel when they meet Z. With `M = L⁻¹`, `A = L Lᵀ`, the same update is
`(M R)ᵀ (M Z)`: the whitened keys `M Z` are small where `M R` is large, and nothing has to cancel.
"""

import torch


def ridge(square: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """ρ of steps whose `z · z` is `square`, at least float32: 1/η, but at least √ε z·z, with ε of that dtype.

    So η z·z counts up to 1/√ε, which is 2,900 in float32 and 67 million in float64. A memory then answers all but
    1/2,900 of its target already; more would only enlarge rounding errors. No gradient flows through this bound.
    """
    return (square.detach() * torch.finfo(square.dtype).eps ** 0.5).clamp(min=1.0 / learning_rate)


def whitening(keys: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """M `[*, C, C]`, lower triangular, at least float32, of `keys [*, C, H]`. Does not wait for the device."""
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    gram = keys @ keys.transpose(-1, -2)
    square = gram.diagonal(dim1=-2, dim2=-1)
    square += ridge(square, learning_rate)
    lower, _ = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower, identity.expand_as(gram), upper=False)


def whitening_row(
    before: torch.Tensor, scores: torch.Tensor, square: torch.Tensor, place: torch.Tensor, learning_rate: float
) -> torch.Tensor:
    """The row of M that one more key adds, `[B, C]`: M grows by a row a step, by bordering.

    Args:
        before: `[B, C, C]`, M of a chunk; rows from `place` on may hold anything.
        scores: `[B, C]`, products of the new key with the chunk's keys; from `place` on they may be anything.
        square: `[B]`, the new key's `z · z`.
        place: `[B]`, of the new key in its chunk.
    """
    index = torch.arange(before.shape[1], device=before.device)
    earlier = index < place[:, None]
    scores = torch.where(earlier, scores, 0.0)
    white = torch.where(earlier, torch.bmm(before, scores[:, :, None])[:, :, 0], 0.0)
    floor = ridge(square, learning_rate)
    # In exact arithmetic no pivot is below ρ, so rounding cannot make one vanish.
    scale = (floor + square - white.square().sum(1)).clamp(min=floor).rsqrt()
    row = -torch.bmm(white[:, None], before)[:, 0]
    return torch.where(index == place[:, None], 1.0, row) * scale[:, None]
