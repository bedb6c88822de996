"""Which steps the matrix products of one pass cover, and those products.

Shapes: `B` rows, `T` steps, `C` chunk size.
"""

import torch

QUERY_BLOCK = 256
"""Smallest number of query steps per matrix product: chunks shorter than this share one and are masked inside it."""


class Blocks:
    """Which steps each matrix product covers: query blocks of whole chunks, and the mask inside a block.

    With C >= QUERY_BLOCK a block is one chunk, sees the keys before it and needs no mask. A block of several chunks
    sees the keys up to its own end, and a mask removes the chunks in it that are not older than the query's own.

    Args:
        steps: T.
        chunk_size: C.
        decay: γ.
        like: has the dtype and device of the scores.
        keys: how many steps, in full chunks, are seen by any other.
    """

    def __init__(self, steps: int, chunk_size: int, decay: float, like: torch.Tensor, keys: int):
        self.steps = steps
        self.chunk_size = chunk_size
        self.per_block = max(1, QUERY_BLOCK // chunk_size)
        self.size = self.per_block * chunk_size
        self.keys = keys
        self.decay = decay
        self.dtype, self.device = like.dtype, like.device  # not `like` itself: it would outlive what autograd saves

    def __iter__(self):
        """Yields `(start, end, keys)`: queries `start:end` see keys `0:keys`, in the first block possibly none."""
        for start in range(0, self.steps, self.size):
            end = min(start + self.size, self.steps)
            yield start, end, min(start if self.per_block == 1 else end, self.keys)

    def mask_(self, scores: torch.Tensor, start: int, end: int, keys: int) -> None:
        """Zero what is not chunk-causal and weigh by `γ^(age - 1)`, in place, for `scores [B, end - start, keys]`."""
        if self.decay == 1.0:
            if keys > start:
                scores[:, :, start:] *= self._weights(start, end, start, keys)
        else:
            scores *= self._weights(start, end, 0, keys)

    def _weights(self, start: int, end: int, first_key: int, last_key: int) -> torch.Tensor:
        query = torch.arange(start, end, device=self.device) // self.chunk_size
        key = torch.arange(first_key, last_key, device=self.device) // self.chunk_size
        age = query[:, None] - key[None, :]
        weights = (age > 0).to(self.dtype)
        if self.decay != 1.0:
            weights = weights * (self.decay ** (age - 1).clamp(min=0).double()).to(self.dtype)
        return weights


def matmul_(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0, add: bool = False) -> None:
    """`out = α a b` or `out += α a b`, in place, for batches of matrices.

    Row by row on a CPU, whose batched product copies what is transposed or strided (3× at Moshi's size).
    """
    if out.device.type != "cpu":
        out.baddbmm_(a, b, beta=float(add), alpha=alpha)
        return
    for out_row, a_row, b_row in zip(out, a, b, strict=True):
        out_row.addmm_(a_row, b_row, beta=float(add), alpha=alpha)
