"""Streaming: In-Place TTT one step at a time, for rows that are each at their own position.

Shapes: `B` rows, `D` model width, `H` hidden width, `C` chunk size, `K` conv kernel.

`LMGen` replays a CUDA graph of the model, and Python does not run on a replay. So every tensor of the state is
allocated once, nothing branches on data, nothing waits for the device, and nothing Python counts decides anything.
Every step costs the same: one read of the delta and 1/C of a chunk's update.
"""

import torch

from .state import FastWeight, ResidualFastWeight, row_numbers, rows_per_step


def step_(
    state: FastWeight,
    z: torch.Tensor,
    taps: torch.Tensor,
    learning_rate: float,
    exec_mask: torch.Tensor,
    *,
    delta_clip: float | None = None,
    decay: float = 1.0,
    target_gain: float = 1.0,
    enabled: torch.Tensor,
) -> torch.Tensor:
    """One streaming step: apply, fold, write. Updates `state` in place where `exec_mask`.

    Args:
        state: the fast weights of B rows; their class says which update is made.
        z: `[B, H]`.
        taps: `[B, K, D]`, see :func:`write_`.
        learning_rate, delta_clip, decay, target_gain: as in :func:`moshi_patch.kinds.in_place.ops.naive`.
        exec_mask: `[B]` bool; a row where it is false stays as it is (its output is what it would have been).
        enabled: bool tensor, `[]` or `[B]`; while false nothing that is heard is ever written, and a chunk heard
            wholly so makes no update. A tensor, so that it also holds inside a replayed CUDA graph.
    Returns:
        `[B, D]`: what the fast weight adds to the down projection's output, in the delta's dtype.
    """
    rate = learning_rate * target_gain
    scores = state.scores(z)
    answer = apply_delta(state, z, scores, rate)
    fold_(state, rate, exec_mask)
    if isinstance(state, ResidualFastWeight):
        heard = enabled[..., None]
        key, first = torch.where(heard, z, 0.0), torch.where(heard, -decay * answer, 0.0)
        state.write_whitening_(key, torch.where(heard, scores, 0.0), learning_rate, exec_mask)
        taps = target_gain * taps.to(answer.dtype)
    else:
        first = torch.zeros_like(state.values[:, 0])
    write_(state, z, taps, first, rate, exec_mask, delta_clip=delta_clip, decay=decay, enabled=enabled)
    return answer


def apply_delta(state: FastWeight, z: torch.Tensor, scores: torch.Tensor, rate: float) -> torch.Tensor:
    """What the fast weight adds to the output of this step: `[B, D]` in the delta's dtype, from `z [B, H]`."""
    # z on the left: with it on the right the CPU's batched product takes four times as long
    kept = torch.bmm(z.to(state.delta.dtype)[:, None], state.delta.transpose(1, 2))[:, 0]
    recent = state.previous_answer(scores, rate)
    return torch.where(state.unfolded_rows(), state.keep[:, None] * kept + recent, kept)


def fold_(state: FastWeight, rate: float, exec_mask: torch.Tensor) -> None:
    """Add this step's `ceil(D / C)` rows of the previous chunk's update to the delta, in place, where `exec_mask`."""
    width = state.delta.shape[1]
    count = rows_per_step(width, state.chunk_size)
    start = state.position % state.chunk_size * count
    # The last windows may stand back from the end so that they fit; rows that are in already are left alone.
    first = start.clamp(max=width - count)
    rows = first[:, None] + torch.arange(count, device=first.device)
    todo = (rows >= start[:, None]) & exec_mask[:, None]
    update = state.previous_update(rows, rate)
    index = row_numbers(rows)[:, None], rows  # whole rows of H values; gather and scatter would go value by value
    old = state.delta[index]
    new = torch.where(todo[:, :, None], state.keep[:, None, None] * old + update, old)
    state.delta.index_put_(index, new)


def write_(
    state: FastWeight,
    z: torch.Tensor,
    taps: torch.Tensor,
    first: torch.Tensor,
    rate: float,
    exec_mask: torch.Tensor,
    *,
    delta_clip: float | None = None,
    decay: float = 1.0,
    enabled: torch.Tensor,
) -> None:
    """Store this step in the current chunk and move on by one position, in place, where `exec_mask`.

    `taps [B, K, D]` holds `W_target (w_k x0_p)`: what the input of this step adds to the value of step p - k, as long
    as that lies in the same chunk. Scattering the convolution forward gives its zero taps at a chunk's end for free.
    `first [B, D]` is what the value of this step begins with.
    """
    size = state.chunk_size
    inside = state.position % size
    lag = torch.arange(taps.shape[1], device=taps.device)
    places = (state.position[:, None] - lag) % (2 * size)
    active = exec_mask & enabled
    reach = (lag <= inside[:, None]) & exec_mask[:, None]
    taps = torch.where((reach & enabled[..., None])[:, :, None], taps, 0.0).to(state.values.dtype)
    key = torch.where(enabled[..., None], z, 0.0).to(state.keys.dtype)

    row = row_numbers(places)
    here, run = (row, places[:, 0]), exec_mask[:, None]
    state.keys.index_put_(here, torch.where(run, key, state.keys[here]))
    state.values.index_put_(here, torch.where(run, first.to(state.values.dtype), state.values[here]))
    if delta_clip is not None:
        state.square += torch.where(exec_mask, _square_growth(state, taps, places), 0.0)
    for k in range(taps.shape[1]):  # K is a setting; places repeat when K > 2C, so one lag at a time
        there = row, places[:, k]
        state.values.index_put_(there, state.values[there] + taps[:, k])

    state.wrote |= active
    ends = exec_mask & (inside == size - 1)
    state.updates += ends & state.wrote
    keep = torch.where(state.wrote, torch.full_like(state.keep, decay), torch.ones_like(state.keep))
    state.keep.copy_(torch.where(ends, keep, state.keep))
    if delta_clip is not None:
        norm = rate * state.square.clamp(min=0.0).sqrt()
        scale = torch.where(norm > delta_clip, delta_clip / norm, 1.0).to(state.scale)
        state.scale.copy_(torch.where(ends, scale, state.scale))
        state.square.masked_fill_(ends, 0.0)
    state.wrote.logical_and_(~ends)
    state.position += exec_mask


def _square_growth(state: FastWeight, taps: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """`[B]` float64: by how much `‖Σ v zᵀ‖²` of the current chunk grows when `taps` are added to its values.

    With M the sum so far and the rank-K change Σ a_k z_kᵀ: `2 Σ a_kᵀ M z_k + Σ_kl (a_k · a_l)(z_k · z_l)`.
    """
    wide = state.delta.dtype
    narrow = state.keys.dtype if state.keys.dtype != torch.float16 else wide
    keys, taps = state.keys.to(narrow), taps.to(narrow)
    z = keys.gather(1, places[:, :, None].expand(-1, -1, keys.shape[2]))  # [B, K, H]
    # What the current chunk holds so far; places after this one still hold the chunk before the previous.
    half = places[:, :1] // state.chunk_size * state.chunk_size
    ring = torch.arange(keys.shape[1], device=keys.device)
    current = (ring >= half) & (ring <= places[:, :1])
    cross = (taps @ state.values.to(narrow).transpose(1, 2)).double() * (z @ keys.transpose(1, 2)).double()
    own = (taps @ taps.transpose(1, 2)).double() * (z @ z.transpose(1, 2)).double()
    return 2 * (cross * current[:, None]).sum((1, 2)) + own.sum((1, 2))
