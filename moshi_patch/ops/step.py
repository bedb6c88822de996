"""Streaming: In-Place TTT one step at a time, for rows that are each at their own position.

Shapes: `B` rows, `D` model width, `H` hidden width, `C` chunk size, `K` conv kernel.

`LMGen` replays a CUDA graph of the model, and Python does not run on a replay. So every tensor here is allocated once,
nothing branches on data, nothing waits for the device, and nothing Python counts decides anything.

The update of a finished chunk is not added to the `[D, H]` delta in one go: at each step of the next chunk
`ceil(D / C)` of its rows are. Until its turn comes, a row's share is computed from the two kept chunks of z and v.
So every step costs the same: one read of the delta and 1/C of a chunk's update.
"""

from dataclasses import dataclass, fields

import torch

from .rows import fill_rows_


@dataclass
class FastWeight:
    """Everything one TTT layer remembers of `B` streams.

    Attributes:
        delta: `[B, D, H]`, at least float32: all updates up to the chunk before the previous one, and the rows of the
            previous chunk's update that were added so far.
        keys: `[B, 2C, H]`, ring of z of the current and the previous chunk: position p stands at `p % 2C`.
        values: `[B, 2C, D]`, ring of v; values of the current chunk grow as the convolution's lookahead arrives.
        position: `[B]` int64, steps since the row's last reset.
        updates: `[B]` int64, updates made since the row's last reset.
        wrote: `[B]` bool, whether anything of the current chunk was written (see `enabled` of :func:`step_`).
        square: `[B]`, squared Frobenius norm of the current chunk's update without η; used by the clip only.
        scale: `[B]`, factor of the clip for the previous chunk's update.
        keep: `[B]`, what the previous chunk's update multiplies the accumulated delta by: γ, or 1 if it wrote nothing.
    """

    delta: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    position: torch.Tensor
    updates: torch.Tensor
    wrote: torch.Tensor
    square: torch.Tensor
    scale: torch.Tensor
    keep: torch.Tensor

    @classmethod
    def allocate(
        cls, batch_size: int, width: int, hidden: int, chunk_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> "FastWeight":
        """The state of `batch_size` fresh streams. `dtype` is that of z; the delta is at least float32."""
        wide = torch.promote_types(dtype, torch.float32)
        at = {"device": device}
        return cls(
            delta=torch.zeros(batch_size, width, hidden, dtype=wide, **at),
            keys=torch.zeros(batch_size, 2 * chunk_size, hidden, dtype=dtype, **at),
            values=torch.zeros(batch_size, 2 * chunk_size, width, dtype=dtype, **at),
            position=torch.zeros(batch_size, dtype=torch.int64, **at),
            updates=torch.zeros(batch_size, dtype=torch.int64, **at),
            wrote=torch.zeros(batch_size, dtype=torch.bool, **at),
            square=torch.zeros(batch_size, dtype=torch.float64, **at),
            scale=torch.ones(batch_size, dtype=wide, **at),
            keep=torch.ones(batch_size, dtype=wide, **at),
        )

    def reset(self, reset_mask: torch.Tensor) -> None:
        """Make the rows where `reset_mask [B]` is true bitwise those of a fresh stream, in place."""
        for field in fields(self):
            tensor = getattr(self, field.name)
            fill_rows_(tensor, reset_mask, 1.0 if field.name in ("scale", "keep") else 0)

    @property
    def chunk_size(self) -> int:
        return self.keys.shape[1] // 2

    def untouched(self) -> bool:
        """Whether no row has written anything since its last reset. Waits for the device: not for every step."""
        return not (self.wrote | (self.updates > 0)).any()

    def previous_chunk(self) -> torch.Tensor:
        """`[B, 2C]` bool: which places of the rings hold the previous chunk (none, all zero, during the first)."""
        size = self.chunk_size
        half = torch.arange(2 * size, device=self.keys.device) // size
        return half != (self.position // size % 2)[:, None]

    def unfolded_rows(self) -> torch.Tensor:
        """`[B, D]` bool: rows of `delta` that still lack the previous chunk's update."""
        width, size = self.delta.shape[1], self.chunk_size
        folded = self.position % size * rows_per_step(width, size)
        return torch.arange(width, device=self.delta.device) >= folded[:, None]

    def full_delta(self, learning_rate: float) -> torch.Tensor:
        """`[B, D, H]`: the fast weight now in force minus W_0. Allocates it; for inspection, not for the step."""
        previous = self.values.to(self.delta) * (self.previous_chunk() * self.scale[:, None])[:, :, None]
        update = learning_rate * previous.transpose(1, 2) @ self.keys.to(self.delta)
        return torch.where(self.unfolded_rows()[:, :, None], self.keep[:, None, None] * self.delta + update, self.delta)


def rows_per_step(width: int, chunk_size: int) -> int:
    """Rows of the delta that each step folds, so that C steps fold all D."""
    return -(-width // chunk_size)


def apply_delta(state: FastWeight, z: torch.Tensor, learning_rate: float) -> torch.Tensor:
    """What the fast weight adds to the output of this step: `[B, D]` in the delta's dtype, from `z [B, H]`."""
    wide = state.delta.dtype
    narrow = state.keys.dtype if state.keys.dtype != torch.float16 else wide  # z·z leaves float16's range
    # z on the left: with it on the right the CPU's batched product takes four times as long
    kept = torch.bmm(z.to(wide)[:, None], state.delta.transpose(1, 2))[:, 0]
    scores = torch.bmm(z.to(narrow)[:, None], state.keys.to(narrow).transpose(1, 2)).to(wide)[:, 0]
    scores = scores * state.previous_chunk() * state.scale[:, None]
    recent = torch.bmm(scores[:, None].to(narrow), state.values.to(narrow))[:, 0].to(wide)
    return torch.where(state.unfolded_rows(), state.keep[:, None] * kept + learning_rate * recent, kept)


def fold_(state: FastWeight, learning_rate: float, exec_mask: torch.Tensor) -> None:
    """Add this step's `ceil(D / C)` rows of the previous chunk's update to the delta, in place, where `exec_mask`."""
    width = state.delta.shape[1]
    count = rows_per_step(width, state.chunk_size)
    start = state.position % state.chunk_size * count
    # The last windows may stand back from the end so that they fit; rows that are in already are left alone.
    first = start.clamp(max=width - count)
    rows = first[:, None] + torch.arange(count, device=first.device)
    todo = (rows >= start[:, None]) & exec_mask[:, None]
    wide = state.delta.dtype
    narrow = state.keys.dtype if state.keys.dtype != torch.float16 else wide
    values = state.values.gather(2, rows[:, None].expand(-1, state.values.shape[1], -1))
    values = values.to(wide) * (state.previous_chunk() * state.scale[:, None])[:, :, None]
    update = learning_rate * torch.bmm(values.to(narrow).transpose(1, 2), state.keys.to(narrow)).to(wide)
    index = _each_row(rows)[:, None], rows  # whole rows of H values; gather and scatter would go value by value
    old = state.delta[index]
    new = torch.where(todo[:, :, None], state.keep[:, None, None] * old + update, old)
    state.delta.index_put_(index, new)


def _each_row(rows: torch.Tensor) -> torch.Tensor:
    """`[B]`: 0 to B - 1, to index with."""
    return torch.arange(len(rows), device=rows.device)


def write_(
    state: FastWeight,
    z: torch.Tensor,
    taps: torch.Tensor,
    learning_rate: float,
    exec_mask: torch.Tensor,
    *,
    delta_clip: float | None = None,
    decay: float = 1.0,
    enabled: torch.Tensor,
) -> None:
    """Store this step in the current chunk and move on by one position, in place, where `exec_mask`.

    `taps [B, K, D]` holds `W_target (w_k x0_p)`: what the input of this step adds to the value of step p - k, as long
    as that lies in the same chunk. Scattering the convolution forward gives its zero taps at a chunk's end for free.
    """
    size = state.chunk_size
    inside = state.position % size
    lag = torch.arange(taps.shape[1], device=taps.device)
    places = (state.position[:, None] - lag) % (2 * size)
    active = exec_mask & enabled
    reach = (lag <= inside[:, None]) & exec_mask[:, None]
    taps = torch.where((reach & enabled)[:, :, None], taps, 0.0).to(state.values.dtype)
    key = torch.where(enabled, z, 0.0).to(state.keys.dtype)

    row = _each_row(places)
    here, run = (row, places[:, 0]), exec_mask[:, None]
    state.keys.index_put_(here, torch.where(run, key, state.keys[here]))
    state.values.index_put_(here, torch.where(run, 0.0, state.values[here]))
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
        norm = learning_rate * state.square.clamp(min=0.0).sqrt()
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


def step_(
    state: FastWeight,
    z: torch.Tensor,
    taps: torch.Tensor,
    learning_rate: float,
    exec_mask: torch.Tensor,
    *,
    delta_clip: float | None = None,
    decay: float = 1.0,
    enabled: torch.Tensor,
) -> torch.Tensor:
    """One streaming step: apply, fold, write. Updates `state` in place where `exec_mask`.

    Args:
        state: the fast weights of B rows.
        z: `[B, H]`.
        taps: `[B, K, D]`, see :func:`write_`.
        learning_rate, delta_clip, decay: as in :func:`moshi_patch.ops.naive`.
        exec_mask: `[B]` bool; a row where it is false stays as it is (its output is what it would have been).
        enabled: bool tensor, `[]` or `[1]`; while false nothing that is heard is ever written, and a chunk heard
            wholly so makes no update. A tensor, so that it also holds inside a replayed CUDA graph.
    Returns:
        `[B, D]`: what the fast weight adds to the down projection's output, in the delta's dtype.
    """
    out = apply_delta(state, z, learning_rate)
    fold_(state, learning_rate, exec_mask)
    write_(state, z, taps, learning_rate, exec_mask, delta_clip=delta_clip, decay=decay, enabled=enabled)
    return out
