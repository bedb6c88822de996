"""Streaming: many steps at once, for rows that are each at their own position. Leaves the state that steps would leave.

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width, `C` chunk size, `L` steps of an aligned buffer.

Each row is shifted right by its place in its chunk, behind what it already holds of that chunk. In these buffers all
rows' chunks begin at multiples of C, so that one call of :func:`dual` serves rows at different positions, and what is
not a step is zero and adds nothing.
"""

from collections.abc import Callable

import torch

from .dual import clip_chunks, dual
from .step import FastWeight, rows_per_step


@torch.no_grad()
def segment_(
    state: FastWeight,
    base: torch.Tensor,
    z: torch.Tensor,
    x0: torch.Tensor,
    targets: Callable[[torch.Tensor], torch.Tensor],
    learning_rate: float,
    exec_mask: torch.Tensor,
    *,
    delta_clip: float | None = None,
    decay: float = 1.0,
) -> torch.Tensor:
    """Apply and update over T steps, as T calls of :func:`step_` with `enabled` true would. No gradients.

    Args:
        state: the fast weights of B rows; updated in place where `exec_mask`.
        base: `[B, T, D]`, the output of the stock down projection.
        z: `[B, T, H]`.
        x0: `[B, T, D]`, the target source.
        targets: from an aligned target source `[B, L, D]`, L a multiple of C, to its targets `[B, L, D]`.
        learning_rate, delta_clip, decay: as in :func:`naive`.
        exec_mask: `[B]` bool.
    Returns:
        `[B, T, D]` in the dtype of `base`.
    """
    size, steps = state.chunk_size, z.shape[1]
    inside = state.position % size
    length = ((steps + size - 1) // size + 1) * size
    place = inside[:, None] + torch.arange(steps, device=z.device)  # [B, T], of each step in the buffers
    previous, current = _halves(state.keys, state.position), _halves(state.values, state.position)
    held = (torch.arange(size, device=z.device) < inside[:, None])[:, :, None]

    keys = _spread(z.to(state.keys.dtype), place, length)
    keys[:, :size] += torch.where(held, previous[1], 0.0)
    values = targets(_spread(x0, place, length)).to(state.values.dtype)
    values[:, :size] += torch.where(held, current[1], 0.0)
    clipped = values if delta_clip is None else clip_chunks(keys, values, size, learning_rate, delta_clip)

    full = state.full_delta(learning_rate)
    out = dual(_spread(base, place, length), keys, clipped, size, learning_rate, decay=decay, delta=full)
    out = _pick(out, place)

    ended = (inside + steps) // size  # [B], chunks that end in this segment
    rest = (inside + steps) % size
    new = _advance(state, full, keys, clipped, ended, rest, learning_rate, decay)
    new["position"] = state.position + steps
    new["updates"] = state.updates + ended
    new["wrote"] = rest > 0
    first = torch.arange(size, device=z.device) + size * ended[:, None]  # of the current chunk, in the buffers
    before = (first - size).clamp(min=0)
    stays = (ended == 0)[:, None, None]
    for name, buffer, current_buffer, old in (("keys", keys, keys, previous), ("values", clipped, values, current)):
        new[name] = _ring(
            torch.where(stays, old[0], _pick(buffer, before)), _pick(current_buffer, first), new["position"]
        )
    new["scale"] = torch.where(ended > 0, torch.ones_like(state.scale), state.scale)
    new["keep"] = torch.where(ended > 0, torch.full_like(state.keep, decay), state.keep)
    if delta_clip is not None:
        z_c, v_c = _pick(keys, first).double(), _pick(values, first).double()
        new["square"] = ((z_c @ z_c.transpose(1, 2)) * (v_c @ v_c.transpose(1, 2))).sum((1, 2))
    for name, value in new.items():
        tensor = getattr(state, name)
        tensor.copy_(torch.where(exec_mask.view(-1, *[1] * (tensor.dim() - 1)), value, tensor))
    return out


def _advance(state, full, keys, values, ended, rest, learning_rate, decay) -> dict[str, torch.Tensor]:
    """The delta as steps would leave it: all but the last ended chunk in whole, of that one the rows that were due."""
    size, width = state.chunk_size, full.shape[1]
    narrow = values.dtype if values.dtype != torch.float16 else full.dtype
    due = (torch.arange(width, device=full.device) < (rest * rows_per_step(width, size))[:, None])[:, :, None]
    age = ended[:, None] - 2 - torch.arange(keys.shape[1], device=full.device) // size  # [B, L]
    weight = (age >= 0) * decay ** age.clamp(min=0).double()
    older = (values * weight[:, :, None].to(values.dtype)).to(narrow).transpose(1, 2) @ keys.to(narrow)
    whole = (decay ** (ended - 1).clamp(min=0).double()).to(full)[:, None, None] * full + learning_rate * older.to(full)
    last = (torch.arange(size, device=full.device) + size * (ended - 1)[:, None]).clamp(min=0)
    newest = learning_rate * (_pick(values, last).to(narrow).transpose(1, 2) @ _pick(keys, last).to(narrow)).to(full)
    moved_on = torch.where(due, decay * whole + newest, whole)
    return {"delta": torch.where((ended > 0)[:, None, None], moved_on, torch.where(due, full, state.delta))}


def _spread(x: torch.Tensor, place: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, L, *]` with `x [B, T, *]` at `place [B, T]` and zero elsewhere."""
    out = x.new_zeros(x.shape[0], length, x.shape[2])
    return out.scatter_(1, place[:, :, None].expand_as(x), x)


def _pick(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """`[B, T, *]`: what `x [B, L, *]` holds at `place [B, T]`."""
    return x.gather(1, place[:, :, None].expand(-1, -1, x.shape[2]))


def _halves(ring: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The previous and the current chunk, `[B, C, *]` each, of a ring `[B, 2C, *]`."""
    first, second = ring.chunk(2, 1)
    odd = (position // first.shape[1] % 2 == 1)[:, None, None]
    return torch.where(odd, first, second), torch.where(odd, second, first)


def _ring(previous: torch.Tensor, current: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The inverse of `_halves`."""
    odd = (position // previous.shape[1] % 2 == 1)[:, None, None]
    return torch.cat([torch.where(odd, previous, current), torch.where(odd, current, previous)], 1)
