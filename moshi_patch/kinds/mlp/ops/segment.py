"""Streaming: many steps at once, for rows that are each at their own position. Leaves the state that steps would leave.

Shapes: `B` rows, `h` heads, `T` steps, `d` head width, `C` mini-batch size, `L` steps of an aligned buffer.

Each row is shifted right by its place in its mini-batch, behind what it already holds of it. In these buffers all rows'
mini-batches begin at multiples of C, and what is not a step has η = 0 and teaches nothing.
"""

from collections import deque

import torch

from .mini_batch import Entries, Layers, MLPWeights, layers_of, learnt, mini_batch, norm_of
from .state import MLPFastWeight, rows_per_step

KEPT = 4
"""Mini-batches of a buffer in which the last 2C steps of every row lie."""


@torch.no_grad()
def segment_(
    state: MLPFastWeight,
    weights: MLPWeights,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    eta: torch.Tensor,
    exec_mask: torch.Tensor,
    *,
    enabled: torch.Tensor,
    learning: torch.Tensor | None = None,
) -> torch.Tensor:
    """Learn and read over T steps, as T calls of :func:`step_` would. No gradients.

    Args:
        q, k, v: `[B, h, T, d]`.
        eta: `[B, h, T]`.
        The others as of :func:`step_`.
    Returns:
        `[B, h, T, d]` in the state's dtype.
    """
    dtype, size, steps = state.delta1.dtype, state.mini_batch_size, q.shape[2]
    learns = (enabled if learning is None else enabled & learning).expand(len(q))
    eta = torch.where(learns[:, None, None], eta.to(dtype), 0.0)
    inside = state.position % size
    place = inside[:, None] + torch.arange(steps, device=q.device)  # [B, T], of each step in a buffer
    count = (steps + 2 * size - 2) // size  # mini-batches in the buffer, wherever in one a row is
    buffers = [_spread(part.to(dtype), place, count * size) for part in (q, k, v, eta[..., None])]
    ended = (inside + steps) // size  # [B], mini-batches that end in this segment

    beginning, norm = layers_of(weights, dtype), norm_of(weights, dtype)
    before, start = Layers(state.delta1, state.delta2), state.at_start()
    held = (torch.arange(size, device=q.device) < inside[:, None])[:, None, :, None], _current(state)
    outputs, recent = [], deque(maxlen=KEPT)
    for number in range(count):
        part = [buffer[:, :, number * size : (number + 1) * size] for buffer in buffers]
        layers = Layers(*(w + delta for w, delta in zip(beginning, start, strict=True)))
        out, entries = mini_batch(layers, norm, *part[:3], part[3][..., 0], held if number == 0 else None)
        outputs.append(out)
        recent.append(entries)
        after = learnt(start, entries)
        if number >= steps // size:  # not the end of a mini-batch in every row
            ends = ended > number
            before, after = _where(ends, start, before), _where(ends, after, start)
        else:
            before = start
        start = after

    changed = {f"delta{layer}": delta for layer, delta in enumerate(_folded(state, before, start, steps), 1)}
    first = (count - len(recent)) * size
    for name, parts in zip(Entries._fields, zip(*recent, strict=True), strict=True):
        changed[name] = _ring_after(getattr(state, name), state.position, steps, torch.cat(parts, 2), first)
    rest = (state.position + steps) % size
    changed["updates"] = state.updates + torch.where(learns, ended, (ended > 0) & state.wrote)
    changed["wrote"] = torch.where(learns, rest > 0, (ended == 0) & state.wrote)
    changed["position"] = state.position + steps
    for name, value in changed.items():
        tensor = getattr(state, name)
        tensor.copy_(torch.where(exec_mask.view(-1, *[1] * (tensor.dim() - 1)), value, tensor))
    return _pick(torch.cat(outputs, 2), place)


def _current(state: MLPFastWeight) -> Entries:
    """`[B, h, C, *]`: the half of the rings in which the current mini-batch stands."""
    size = state.mini_batch_size
    odd = (state.position // size % 2 == 1)[:, None, None, None]
    return Entries(*(torch.where(odd, ring[:, :, size:], ring[:, :, :size]) for ring in state.rings()))


def _where(rows: torch.Tensor, one: Layers, other: Layers) -> Layers:
    mask = rows[:, None, None, None]
    return Layers(*(torch.where(mask, a, b) for a, b in zip(one, other, strict=True)))


def _folded(state: MLPFastWeight, before: Layers, start: Layers, steps: int) -> Layers:
    """The deltas as steps would leave them: of the last update the input rows that were due, `before` in the others."""
    rest = (state.position + steps) % state.mini_batch_size
    deltas = []
    for old, new in zip(before, start, strict=True):
        due = rest[:, None] * rows_per_step(old.shape[2], state.mini_batch_size)
        due = torch.arange(old.shape[2], device=old.device) < due
        deltas.append(torch.where(due[:, None, :, None], new, old))
    return Layers(*deltas)


def _ring_after(
    ring: torch.Tensor, position: torch.Tensor, steps: int, buffer: torch.Tensor, first: int
) -> torch.Tensor:
    """`[B, h, 2C, *]`: `ring` after the segment, whose buffer from place `first` on is `buffer [B, h, L', *]`."""
    length = ring.shape[2]
    place = torch.arange(length, device=ring.device)
    last = (position + steps - 1)[:, None]
    latest = last - (last - place) % length  # [B, 2C], the last position that stands at each place
    there = latest - position[:, None] + (position % (length // 2))[:, None] - first
    written = (latest >= position[:, None])[:, None, :, None]
    return torch.where(written, _pick(buffer, there.clamp(min=0)), ring)


def _spread(x: torch.Tensor, place: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, h, L, *]` with `x [B, h, T, *]` at `place [B, T]` and zero elsewhere."""
    out = x.new_zeros(*x.shape[:2], length, x.shape[3])
    return out.scatter_(2, place[:, None, :, None].expand_as(x), x)


def _pick(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """`[B, h, T, *]`: what `x [B, h, L, *]` holds at `place [B, T]`."""
    return x.gather(2, place[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3]))
