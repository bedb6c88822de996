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
    length = ((steps + size - 1) // size + 1) * size
    place = (state.position % size)[:, None] + torch.arange(steps, device=z.device)  # [B, T], of each step in a buffer
    keys = _behind_held(state.keys, state.position, _spread(z, place, length))
    values = _behind_held(state.values, state.position, targets(_spread(x0, place, length)))
    clipped = values if delta_clip is None else clip_chunks(keys, values, size, learning_rate, delta_clip)

    before = state.full_delta(learning_rate)
    out = dual(_spread(base, place, length), keys, clipped, size, learning_rate, decay=decay, delta=before)

    ended = (state.position % size + steps) // size  # [B], chunks that end in this segment
    after = {
        "delta": _delta_after(state, before, keys, clipped, ended, steps, learning_rate, decay),
        "keys": _ring_after(state.keys, state.position, steps, keys, keys),
        "values": _ring_after(state.values, state.position, steps, clipped, values),
        "position": state.position + steps,
        "updates": state.updates + ended,
        "wrote": (state.position + steps) % size > 0,
        "scale": torch.where(ended > 0, torch.ones_like(state.scale), state.scale),  # `clipped` has the factor in it
        "keep": torch.where(ended > 0, torch.full_like(state.keep, decay), state.keep),
    }
    if delta_clip is not None:
        after["square"] = _square(_pick(keys, _chunk(ended, size)), _pick(values, _chunk(ended, size)))
    for name, value in after.items():
        tensor = getattr(state, name)
        tensor.copy_(torch.where(exec_mask.view(-1, *[1] * (tensor.dim() - 1)), value, tensor))
    return _pick(out, place)


def _behind_held(ring: torch.Tensor, position: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """`buffer [B, L, *]` in the dtype of `ring`, and before it, added to it, what each row holds of its current chunk.

    Added, as a step's convolution also reaches back into values that are held.
    """
    size = ring.shape[1] // 2
    held = (torch.arange(size, device=ring.device) < (position % size)[:, None])[:, :, None]
    _, current = _halves(ring, position)
    buffer = buffer.to(ring.dtype)
    buffer[:, :size] += torch.where(held, current, 0.0)
    return buffer


def _delta_after(
    state: FastWeight,
    before: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ended: torch.Tensor,
    steps: int,
    learning_rate: float,
    decay: float,
) -> torch.Tensor:
    """The delta as steps would leave it: all but the last ended chunk in whole, of that one the rows that were due.

    `before [B, D, H]` is the delta in force at the segment's start, `ended [B]` the chunks that end in it.
    """
    size, width = state.chunk_size, before.shape[1]
    narrow = values.dtype if values.dtype != torch.float16 else before.dtype
    rest = (state.position + steps) % size
    due = (torch.arange(width, device=before.device) < (rest * rows_per_step(width, size))[:, None])[:, :, None]

    def outer(v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return learning_rate * (v.to(narrow).transpose(1, 2) @ z.to(narrow)).to(before)

    age = ended[:, None] - 2 - torch.arange(keys.shape[1], device=before.device) // size  # [B, L], 0: the last but one
    weight = ((age >= 0) * decay ** age.clamp(min=0).double()).to(values.dtype)
    earlier = (decay ** (ended - 1).clamp(min=0).double()).to(before)[:, None, None] * before
    whole = earlier + outer(values * weight[:, :, None], keys)
    last = _chunk((ended - 1).clamp(min=0), size)
    moved_on = torch.where(due, decay * whole + outer(_pick(values, last), _pick(keys, last)), whole)
    return torch.where((ended > 0)[:, None, None], moved_on, torch.where(due, before, state.delta))


def _ring_after(
    ring: torch.Tensor, position: torch.Tensor, steps: int, finished: torch.Tensor, current: torch.Tensor
) -> torch.Tensor:
    """`[B, 2C, *]`: `ring` after the segment, from buffers `[B, L, *]` of finished chunks and of the current one."""
    size = ring.shape[1] // 2
    ended = (position % size + steps) // size
    old_previous, _ = _halves(ring, position)
    new_previous = _pick(finished, _chunk((ended - 1).clamp(min=0), size))
    previous = torch.where((ended == 0)[:, None, None], old_previous, new_previous)
    return _ring(previous, _pick(current, _chunk(ended, size)), position + steps)


def _square(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`[B]` float64: `‖Σ v zᵀ‖²` of chunks `[B, C, *]`."""
    z, v = keys.double(), values.double()
    return ((z @ z.transpose(1, 2)) * (v @ v.transpose(1, 2))).sum((1, 2))


def _chunk(number: torch.Tensor, size: int) -> torch.Tensor:
    """`[B, C]`: the places of each row's chunk `number [B]` in a buffer."""
    return size * number[:, None] + torch.arange(size, device=number.device)


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
