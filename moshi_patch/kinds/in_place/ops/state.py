"""What one TTT layer remembers while streaming: `FastWeight` and, for the residual update, `ResidualFastWeight`.

Shapes: `B` rows, `D` model width, `H` hidden width, `C` chunk size, `R` rows of the delta.

The update of a finished chunk is not added to the `[D, H]` delta in one go: at each step of the next chunk
`ceil(D / C)` of its rows are. Until its turn comes, a row's share is computed from the two kept chunks of z and v.
"""

from dataclasses import dataclass, fields

import torch

from ...rows import fill_rows_
from .whiten import whitening_row


@dataclass
class FastWeight:
    """Everything one TTT layer remembers of `B` streams, with the paper's update `η g Σ v zᵀ`.

    Where a method takes a `rate` it is η g.

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
        return cls(**_fresh(batch_size, width, hidden, chunk_size, dtype, dtype, device))

    def reset(self, reset_mask: torch.Tensor) -> None:
        """Make the rows where `reset_mask [B]` is true bitwise those of a fresh stream, in place."""
        for field in fields(self):
            fill_rows_(getattr(self, field.name), reset_mask, 1.0 if field.name in ("scale", "keep") else 0)

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

    def scores(self, z: torch.Tensor) -> torch.Tensor:
        """`[B, 2C]` in the delta's dtype: products of `z [B, H]` with the kept keys."""
        narrow = self._narrow()
        return torch.bmm(z.to(narrow)[:, None], self.keys.to(narrow).transpose(1, 2)).to(self.delta.dtype)[:, 0]

    def previous_answer(self, scores: torch.Tensor, rate: float) -> torch.Tensor:
        """`[B, D]` in the delta's dtype: what the previous chunk's update alone answers a z with these `scores`."""
        narrow = self._narrow()
        scores = scores * self.previous_chunk() * self.scale[:, None]
        return rate * torch.bmm(scores[:, None].to(narrow), self.values.to(narrow))[:, 0].to(self.delta.dtype)

    def previous_update(self, rows: torch.Tensor, rate: float) -> torch.Tensor:
        """`[B, R, H]` in the delta's dtype: the previous chunk's update at `rows [B, R]` of the delta."""
        wide, narrow = self.delta.dtype, self._narrow()
        values = self.values.gather(2, rows[:, None].expand(-1, self.values.shape[1], -1))
        values = values.to(wide) * (self.previous_chunk() * self.scale[:, None])[:, :, None]
        return rate * torch.bmm(values.to(narrow).transpose(1, 2), self.keys.to(narrow)).to(wide)

    def full_delta(self, rate: float) -> torch.Tensor:
        """`[B, D, H]`: the fast weight now in force minus W_0. Allocates it; for inspection, not for the step."""
        update = self._whole_update(rate)
        return torch.where(self.unfolded_rows()[:, :, None], self.keep[:, None, None] * self.delta + update, self.delta)

    def _whole_update(self, rate: float) -> torch.Tensor:
        previous = self.values.to(self.delta) * (self.previous_chunk() * self.scale[:, None])[:, :, None]
        return rate * previous.transpose(1, 2) @ self.keys.to(self.delta)

    def _narrow(self) -> torch.dtype:
        """What products of z are computed in: z·z leaves float16's range."""
        return self.keys.dtype if self.keys.dtype != torch.float16 else self.delta.dtype


@dataclass
class ResidualFastWeight(FastWeight):
    """The same with the residual update, which writes what is missing: `(g V - γ D)ᵀ A⁻¹ Z`, see `ops.whiten`.

    `keys` are at least float32, as repeated keys are told apart by their products. `values` hold what is missing:
    minus γ times what the fast weight answered at that step, plus g times the target as it arrives.

    Attributes:
        whitening: `[B, 2, C, C]`, at least float32: M of the two kept chunks; that of the current one grows by rows.
    """

    whitening: torch.Tensor

    @classmethod
    def allocate(
        cls, batch_size: int, width: int, hidden: int, chunk_size: int, dtype: torch.dtype, device: torch.device | str
    ) -> "ResidualFastWeight":
        """The state of `batch_size` fresh streams. `dtype` is that of z."""
        wide = torch.promote_types(dtype, torch.float32)
        narrow = dtype if dtype != torch.float16 else wide  # g v leaves float16's range
        fresh = _fresh(batch_size, width, hidden, chunk_size, wide, narrow, device)
        whitening = torch.zeros(batch_size, 2, chunk_size, chunk_size, dtype=wide, device=device)
        return cls(**fresh, whitening=whitening)

    def previous_answer(self, scores: torch.Tensor, rate: float) -> torch.Tensor:
        """See :meth:`FastWeight.previous_answer`; `rate` is of no account."""
        matrix = self._previous(self.whitening.flatten(1, 2))
        white = torch.bmm(matrix, self._previous(scores)[:, :, None])
        weights = self._in_ring(torch.bmm(matrix.transpose(1, 2), white))[:, :, 0]
        narrow = self.values.dtype
        return torch.bmm(weights[:, None].to(narrow), self.values)[:, 0].to(self.delta.dtype)

    def previous_update(self, rows: torch.Tensor, rate: float) -> torch.Tensor:
        """See :meth:`FastWeight.previous_update`; `rate` is of no account."""
        values = self.values.gather(2, rows[:, None].expand(-1, self.values.shape[1], -1))
        return self._update(values)

    def _whole_update(self, rate: float) -> torch.Tensor:
        return self._update(self.values)

    def _update(self, values: torch.Tensor) -> torch.Tensor:
        """`[B, R, H]`: the previous chunk's update, from these columns `[B, 2C, R]` of the values."""
        matrix = self._previous(self.whitening.flatten(1, 2))
        missing = self._previous(values).to(matrix.dtype)
        errors = torch.bmm(matrix.transpose(1, 2), torch.bmm(matrix, missing))
        return self._with_previous_keys(errors, copying=self.keys.device.type == "cpu")

    def _with_previous_keys(self, errors: torch.Tensor, copying: bool) -> torch.Tensor:
        """`[B, R, H]`: products of `errors [B, C, R]` with the previous chunk's keys.

        Copying that chunk out of the ring takes less time on a CPU; reading all of the ring moves fewer bytes.
        """
        if copying:
            return torch.bmm(errors.transpose(1, 2), self._previous(self.keys))
        return torch.bmm(self._in_ring(errors).transpose(1, 2), self.keys)

    def _previous(self, ring: torch.Tensor) -> torch.Tensor:
        """`[B, C, *]`: the previous chunk's part of `ring [B, 2C, *]`, a copy."""
        halves = ring.unflatten(1, (2, -1)).flatten(0, 1)
        return halves.index_select(0, self._previous_half())  # four times as fast on a CPU as an index of two tensors

    def _in_ring(self, chunk: torch.Tensor) -> torch.Tensor:
        """`[B, 2C, *]`: `chunk [B, C, *]` where the previous chunk stands, and zeros."""
        halves = chunk.new_zeros(2 * len(chunk), *chunk.shape[1:])
        return halves.index_copy_(0, self._previous_half(), chunk).unflatten(0, (-1, 2)).flatten(1, 2)

    def _previous_half(self) -> torch.Tensor:
        """`[B]`: the number of each row's previous chunk among the 2B halves of a ring."""
        return 2 * row_numbers(self.position) + 1 - self.position // self.chunk_size % 2

    def write_whitening_(
        self, key: torch.Tensor, scores: torch.Tensor, learning_rate: float, exec_mask: torch.Tensor
    ) -> None:
        """Add the row of a new step's `key [B, H]` to M of the current chunk, in place, where `exec_mask`.

        `scores [B, 2C]` are the products of `key` with the kept keys.
        """
        size = self.chunk_size
        row, half, place = row_numbers(self.position), self.position // size % 2, self.position % size
        new = whitening_row(
            self.whitening[row, half],
            scores.unflatten(1, (2, -1))[row, half],
            key.to(scores.dtype).square().sum(1),
            place,
            learning_rate,
        )
        here = row, half, place
        self.whitening.index_put_(here, torch.where(exec_mask[:, None], new, self.whitening[here]))

    def known_share(self) -> torch.Tensor:
        """`[B]`, from 0 to 1: how much of the previous chunk's targets the fast weight answered already.

        `1 - Σ‖g v - γ d‖² / Σ‖g v‖²`, at least 0; d is what it answered in that chunk. NaN where there was no target.
        For inspection: allocates a delta or two.
        """
        update = self._whole_update(0.0)
        kept = torch.where(self.unfolded_rows()[:, :, None], self.keep[:, None, None] * self.delta, self.delta - update)
        answers = self._previous(self.keys) @ kept.transpose(1, 2)  # γ d
        missing = self._previous(self.values).to(answers.dtype)
        targets = missing + answers
        share = 1.0 - missing.square().sum((1, 2)) / targets.square().sum((1, 2))
        return share.clamp(min=0.0)


def rows_per_step(width: int, chunk_size: int) -> int:
    """Rows of the delta that each step folds, so that C steps fold all D."""
    return -(-width // chunk_size)


def row_numbers(rows: torch.Tensor) -> torch.Tensor:
    """`[B]`: 0 to B - 1, to index with."""
    return torch.arange(len(rows), device=rows.device)


def _fresh(
    batch_size: int,
    width: int,
    hidden: int,
    chunk_size: int,
    key_dtype: torch.dtype,
    value_dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, torch.Tensor]:
    wide = torch.promote_types(value_dtype, torch.float32)
    at = {"device": device}
    return {
        "delta": torch.zeros(batch_size, width, hidden, dtype=wide, **at),
        "keys": torch.zeros(batch_size, 2 * chunk_size, hidden, dtype=key_dtype, **at),
        "values": torch.zeros(batch_size, 2 * chunk_size, width, dtype=value_dtype, **at),
        "position": torch.zeros(batch_size, dtype=torch.int64, **at),
        "updates": torch.zeros(batch_size, dtype=torch.int64, **at),
        "wrote": torch.zeros(batch_size, dtype=torch.bool, **at),
        "square": torch.zeros(batch_size, dtype=torch.float64, **at),
        "scale": torch.ones(batch_size, dtype=wide, **at),
        "keep": torch.ones(batch_size, dtype=wide, **at),
    }
