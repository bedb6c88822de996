"""Streaming: many steps at once, for rows that are each at their own position. Leaves the state that steps would leave.

Shapes: `B` rows, `T` steps, `D` model width, `H` hidden width, `C` chunk size, `L` steps of an aligned buffer.

Each row is shifted right by its place in its chunk, behind what it already holds of that chunk. In these buffers all
rows' chunks begin at multiples of C, so that one call of :func:`dual` serves rows at different positions, and what is
not a step is zero and adds nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .dual import apply_earlier, clip_chunks, dual, segment_steps, updated
from .residual import residual_pass
from .state import FastWeight, ResidualFastWeight, rows_per_step


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
    target_gain: float = 1.0,
) -> torch.Tensor:
    """Apply and update over T steps, as T calls of :func:`step_` with `enabled` true would. No gradients.

    Args:
        state: the fast weights of B rows; updated in place where `exec_mask`.
        base: `[B, T, D]`, the output of the stock down projection.
        z: `[B, T, H]`.
        x0: `[B, T, D]`, the target source.
        targets: from an aligned target source `[B, L, D]`, L a multiple of C, to its targets `[B, L, D]`.
        learning_rate, delta_clip, decay, target_gain: as in :func:`naive`.
        exec_mask: `[B]` bool.
    Returns:
        `[B, T, D]` in the dtype of `base`.
    """
    size, steps = state.chunk_size, z.shape[1]
    length = ((steps + size - 1) // size + 1) * size
    place = (state.position % size)[:, None] + torch.arange(steps, device=z.device)  # [B, T], of each step in a buffer
    keys = _behind_held(state.keys, state.position, _spread(z, place, length))
    values = targets(_spread(x0, place, length))
    aligned = _spread(base, place, length)
    before = state.full_delta(learning_rate * target_gain)
    if isinstance(state, ResidualFastWeight):
        values = target_gain * values.to(state.values.dtype)
        done = _residual(state, aligned, keys, values, before, learning_rate, decay)
    else:
        done = _hebbian(state, aligned, keys, values, before, learning_rate * target_gain, delta_clip, decay)

    ended = (state.position % size + steps) // size  # [B], chunks that end in this segment
    after = {
        "delta": _delta_after(state, before, done, ended, steps, decay),
        "position": state.position + steps,
        "updates": state.updates + ended,
        "wrote": (state.position + steps) % size > 0,
        "scale": torch.where(ended > 0, torch.ones_like(state.scale), state.scale),  # the clip is in the values
        "keep": torch.where(ended > 0, torch.full_like(state.keep, decay), state.keep),
    }
    for name, (finished, current) in done.rings.items():
        ring = getattr(state, name)
        flat = ring if ring.dim() == 3 else ring.flatten(1, 2)
        after[name] = _ring_after(flat, state.position, steps, finished, current).view_as(ring)
    if delta_clip is not None:
        after["square"] = _square(*(_pick(ring[1], _chunk(ended, size)) for ring in done.rings.values()))
    for name, value in after.items():
        tensor = getattr(state, name)
        tensor.copy_(torch.where(exec_mask.view(-1, *[1] * (tensor.dim() - 1)), value, tensor))
    return _pick(done.out, place)


class _Done(NamedTuple):
    """What the two updates make of an aligned segment.

    Attributes:
        out: `[B, L, D]`.
        keys, values, rate: `[B, L, H]` and `[B, L, D]`; a chunk's update is `rate valuesᵀ keys`.
        rings: by the state's field, what its ring holds of finished chunks and of the current one, `[B, L, *]` each.
    """

    out: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    rate: float
    rings: dict[str, tuple[torch.Tensor, torch.Tensor]]


def _hebbian(state, base, keys, values, before, rate, delta_clip, decay) -> _Done:
    values = _behind_held(state.values, state.position, values)
    clipped = values if delta_clip is None else clip_chunks(keys, values, state.chunk_size, rate, delta_clip)
    out = dual(base, keys, clipped, state.chunk_size, rate, decay=decay, delta=before)
    return _Done(out, keys, clipped, rate, {"keys": (keys, keys), "values": (clipped, values)})


def _residual(state, base, keys, targets, before, learning_rate, decay) -> _Done:
    size, narrow = state.chunk_size, state.values.dtype
    # The ring holds what was missing. With what was answered, which is what would be answered now, it is the target.
    answered = decay * (keys[:, :size].to(before.dtype) @ before.transpose(1, 2))
    targets = _behind_held(state.values, state.position, targets).to(before.dtype)
    targets[:, :size] += torch.where(_held(state.position, size), answered, 0.0)
    keys, targets = keys.to(narrow), targets.to(narrow)  # the keys were of this dtype before they were kept
    length = keys.shape[1]
    segment, delta, parts = segment_steps(length, targets.shape[2], keys.shape[2], size), before, []
    for start in range(0, length, segment):
        part = slice(start, start + segment)
        earlier = apply_earlier(delta, keys[:, part], size, decay)
        parts.append(residual_pass(keys[:, part], targets[:, part], earlier, size, learning_rate, decay))
        if start + segment < length:
            delta = updated(delta, parts[-1].keys, parts[-1].values, size, 1.0, decay)
    answers, white_keys, white_values, whitening = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    missing = (targets - decay * answers).to(state.values.dtype)
    rings = {"keys": keys.to(state.keys.dtype), "values": missing, "whitening": whitening.flatten(1, 2)}
    out = base + answers.to(base.dtype)
    return _Done(out, white_keys, white_values, 1.0, {name: (ring, ring) for name, ring in rings.items()})


def _behind_held(ring: torch.Tensor, position: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """`buffer [B, L, *]` in the dtype of `ring`, and before it, added to it, what each row holds of its current chunk.

    Added, as a step's convolution also reaches back into values that are held.
    """
    size = ring.shape[1] // 2
    _, current = _halves(ring, position)
    buffer = buffer.to(ring.dtype)
    buffer[:, :size] += torch.where(_held(position, size), current, 0.0)
    return buffer


def _held(position: torch.Tensor, size: int) -> torch.Tensor:
    """`[B, C, 1]` bool: the places of the current chunk that a row holds already."""
    return (torch.arange(size, device=position.device) < (position % size)[:, None])[:, :, None]


def _delta_after(
    state: FastWeight, before: torch.Tensor, done: _Done, ended: torch.Tensor, steps: int, decay: float
) -> torch.Tensor:
    """The delta as steps would leave it: all but the last ended chunk in whole, of that one the rows that were due.

    `before [B, D, H]` is the delta in force at the segment's start, `ended [B]` the chunks that end in it.
    """
    keys, values, size, width = done.keys, done.values, state.chunk_size, before.shape[1]
    narrow = values.dtype if values.dtype != torch.float16 else before.dtype
    rest = (state.position + steps) % size
    due = (torch.arange(width, device=before.device) < (rest * rows_per_step(width, size))[:, None])[:, :, None]

    def outer(v: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return done.rate * (v.to(narrow).transpose(1, 2) @ z.to(narrow)).to(before)

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
