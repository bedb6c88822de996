"""The specification: In-Place TTT as the loop over chunks of the paper, out of place, in the dtype it is given.

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width of the gated MLP, `C` chunk size, `K` conv kernel.
Slow on purpose: every fast path is tested against these two functions, so they share no code with them.
"""

import torch


def naive_target(x0: torch.Tensor, conv: torch.Tensor, w_target: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Targets `v_t = W_target · Σ_k w_k x0_{t+k}`, with zero taps beyond the last step of t's own chunk.

    Args:
        x0: `[B, T, D]`, the target source.
        conv: `[D, 1, K]` (one filter per channel) or `[D, D, K]` (full convolution).
        w_target: `[D, D]`.
        chunk_size: C, in steps.
    Returns:
        `[B, T, D]`, v̂ of In-Place TTT (arXiv 2604.06169).
    """
    steps, kernel = x0.shape[1], conv.shape[2]
    targets = []
    for t in range(steps):
        chunk_end = min(steps, (t // chunk_size + 1) * chunk_size)
        c = torch.zeros_like(x0[:, t])
        for k in range(min(kernel, chunk_end - t)):
            tap = conv[:, :, k]
            c = c + (x0[:, t + k] * tap[:, 0] if conv.shape[1] == 1 else x0[:, t + k] @ tap.T)
        targets.append(c @ w_target.T)
    return torch.stack(targets, 1)


def naive(
    z: torch.Tensor,
    v: torch.Tensor,
    w_down: torch.Tensor,
    chunk_size: int,
    learning_rate: float,
    *,
    update: str = "hebbian",
    target_gain: float = 1.0,
    delta_clip: float | None = None,
    decay: float = 1.0,
    delta: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply, then update: `o_t = W_i z_t` for the steps of chunk i, then `W_{i+1}` from that chunk's targets.

    Args:
        z: `[B, T, H]`, gated hidden activations.
        v: `[B, T, D]`, targets.
        w_down: `[D, H]`, W_0.
        chunk_size: C, in steps. A last chunk shorter than C is applied but makes no update yet.
        learning_rate: η; the update sums over the chunk.
        update: `"hebbian"`, `η g Vᵀ Z` as in the paper, or `"residual"`, see :func:`naive_residual`.
        target_gain: g, multiplies the targets.
        delta_clip: largest Frobenius norm of one chunk's update, η and g included; with `"hebbian"` alone.
        decay: γ, multiplies the accumulated delta before each update is added.
        delta: `[B, D, H]`, what earlier segments left; zero when absent.
    Returns:
        The outputs `[B, T, D]` and the final delta `[B, D, H]`, i.e. `W_n - W_0`.
    """
    if delta is None:
        delta = torch.zeros(z.shape[0], *w_down.shape, dtype=z.dtype, device=z.device)
    outputs = []
    for start in range(0, z.shape[1], chunk_size):
        z_i, v_i = z[:, start : start + chunk_size], v[:, start : start + chunk_size]
        outputs.append(z_i @ (w_down + delta).transpose(1, 2))
        if z_i.shape[1] == chunk_size:
            if update == "residual":
                change = naive_residual(z_i, target_gain * v_i - decay * (z_i @ delta.transpose(1, 2)), learning_rate)
            else:
                change = learning_rate * target_gain * v_i.transpose(1, 2) @ z_i
            if delta_clip is not None:
                change = torch.stack([c * (delta_clip / c.norm()) if c.norm() > delta_clip else c for c in change])
            delta = decay * delta + change
    return torch.cat(outputs, 1), delta


def naive_residual(z: torch.Tensor, missing: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """`[B, D, H]`, the change that answers most of what is `missing [B, C, D]` at the keys `z [B, C, H]` of a chunk.

    It is `argmin_U ½ ‖missing - z Uᵀ‖² + 1/(2η) ‖U‖²`, namely `missingᵀ (z zᵀ + I/η)⁻¹ z`. For a key with
    `η z·z > 1/√ε`, ε being the rounding of the dtype, η is that much smaller.
    """
    square = z.detach().square().sum(2)
    ridge = (square * torch.finfo(z.dtype).eps ** 0.5).clamp(min=1 / learning_rate)
    return torch.linalg.solve(z @ z.transpose(1, 2) + torch.diag_embed(ridge), missing).transpose(1, 2) @ z
