"""Streaming: TTT-MLP one step at a time, for rows that are each at their own position.

Shapes: `B` rows, `h` heads, `d` head width, `n` hidden width (4d), `C` mini-batch size, `m` input rows of a layer.

`LMGen` replays a CUDA graph of the model, and Python does not run on a replay. So every tensor of the state is
allocated once, nothing branches on data, nothing waits for the device, and every step does the same work.
"""

import torch

from .mini_batch import Entries, MLPWeights, gelu, loss_gradient, norm_of, normalised, through_gelu, with_one
from .state import MLPFastWeight, rows_per_step


@torch.no_grad()
def step_(
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
    """One streaming step: learn, then read. Updates `state` in place where `exec_mask`.

    Args:
        state: of B rows.
        weights: as of :func:`naive`; in the state's dtype they are not copied.
        q, k, v: `[B, h, d]`.
        eta: `[B, h]`.
        exec_mask: `[B]` bool; a row where it is false stays as it is (its output is what it would have been).
        enabled: bool tensor, `[]` or `[1]`; while false nothing is learnt and positions go on. A tensor, so that it
            also holds inside a replayed CUDA graph.
        learning: `[B]` bool, the same row by row; None: all rows learn.
    Returns:
        `[B, h, d]` in the state's dtype.
    """
    dtype = state.delta1.dtype
    q, k, v, eta = (part.to(dtype) for part in (q, k, v, eta))
    weights = MLPWeights(*(part.to(dtype) for part in weights))
    norm = norm_of(weights, dtype)
    learns = enabled if learning is None else enabled & learning
    eta = torch.where(learns.expand(len(q))[:, None], eta, 0.0)[:, :, None, None]
    q, k, v = q[:, :, None], k[:, :, None], v[:, :, None]

    places = state.places()
    first, second = (_Layer(number, state, weights, places) for number in (1, 2))
    z1, z1_read = first.at_start_and_now(k, q)
    hidden = gelu(z1)
    grad2 = loss_gradient(second.at_start(hidden), k, v, norm)
    grad1 = eta * through_gelu(second.backward(grad2), z1)
    grad2 = eta * grad2

    # What this step itself teaches is read beside the rings: rows that do not run leave theirs as they are.
    key, hidden_1 = with_one(k), with_one(hidden)
    own = with_one(q) @ key.transpose(2, 3)
    hidden_read = gelu(z1_read - own * grad1)
    own = with_one(hidden_read) @ hidden_1.transpose(2, 3)
    out = q + normalised(second.now(hidden_read) - own * grad2, norm)

    for layer in (first, second):
        layer.fold_(exec_mask)
    _write_(state, Entries(key, hidden_1, grad1, grad2), exec_mask, exec_mask & learns)
    return out[:, :, 0]


class _Layer:
    """One layer of the inner MLP during a step, at the start of the mini-batch or with what was learnt in it.

    It is the learnt layer, the delta, less what entries teach that is not in the delta: of the previous mini-batch in
    the input rows not folded yet, and, to read, of the current one in all of them.
    """

    def __init__(
        self, number: int, state: MLPFastWeight, weights: MLPWeights, places: tuple[torch.Tensor, torch.Tensor]
    ):
        self.state = state
        self.weight, self.bias, self.delta, self.inputs, self.gradients = (
            (weights.W1, weights.b1, state.delta1, state.keys, state.grad1)
            if number == 1
            else (weights.W2, weights.b2, state.delta2, state.hidden, state.grad2)
        )
        self.previous, self.current = (mask[:, None, None] for mask in places)  # [B, 1, 1, 2C]
        self.unfolded = state.unfolded(self.delta)[:, None, None]  # [B, 1, 1, m]

    def at_start(self, u: torch.Tensor) -> torch.Tensor:
        """`u [B, h, 1, m - 1]` through the layer as it was when the mini-batch began."""
        u_1 = with_one(u)
        return self._kept(u, u_1) - torch.where(self.previous, self._unfolded_scores(u_1), 0.0) @ self.gradients

    def now(self, u: torch.Tensor) -> torch.Tensor:
        """The same with what the steps before this one taught."""
        u_1 = with_one(u)
        return self._kept(u, u_1) - self._scores_now(u_1) @ self.gradients

    def at_start_and_now(self, u: torch.Tensor, u_read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both at once, so that the weights are read once."""
        both = torch.cat([u, u_read], 2)
        u_1, read_1 = with_one(both).split(1, 2)
        scores = torch.cat([torch.where(self.previous, self._unfolded_scores(u_1), 0.0), self._scores_now(read_1)], 2)
        return (self._kept(both, torch.cat([u_1, read_1], 2)) - scores @ self.gradients).split(1, 2)

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """From the gradient to the layer's output at the mini-batch's start that to its input without the one."""
        scores = torch.where(self.previous, gradient @ self.gradients.transpose(2, 3), 0.0)
        recent = torch.where(self.unfolded, scores @ self.inputs, 0.0)
        learnt = gradient @ self.delta.transpose(2, 3) - recent
        return _shared(gradient, self.weight.transpose(1, 2)) + learnt[..., :-1]

    def fold_(self, exec_mask: torch.Tensor) -> None:
        """Add this step's input rows of the previous mini-batch's update to the delta, in place, where `exec_mask`."""
        size, inputs = self.state.mini_batch_size, self.delta.shape[2]
        count = rows_per_step(inputs, size)
        start = self.state.position % size * count
        # The last windows may stand back from the end so that they fit; rows that are in already are left alone.
        rows = start.clamp(max=inputs - count)[:, None] + torch.arange(count, device=start.device)  # [B, r]
        todo = ((rows >= start[:, None]) & exec_mask[:, None])[:, None, :, None]
        index = rows[:, None, None].expand(*self.inputs.shape[:3], -1)
        inputs_there = torch.where(self.previous.transpose(2, 3), self.inputs.gather(3, index), 0.0)
        update = inputs_there.transpose(2, 3) @ self.gradients
        row, head = (torch.arange(extent, device=rows.device) for extent in self.delta.shape[:2])
        where = row[:, None, None], head[:, None], rows[:, None]  # whole input rows, not value by value
        old = self.delta[where]
        self.delta.index_put_(where, torch.where(todo, old - update, old))

    def _kept(self, u: torch.Tensor, u_1: torch.Tensor) -> torch.Tensor:
        return _shared(u, self.weight) + self.bias + u_1 @ self.delta

    def _unfolded_scores(self, u_1: torch.Tensor) -> torch.Tensor:
        return torch.where(self.unfolded, u_1, 0.0) @ self.inputs.transpose(2, 3)

    def _scores_now(self, u_1: torch.Tensor) -> torch.Tensor:
        both = torch.cat([torch.where(self.unfolded, u_1, 0.0), u_1], 2) @ self.inputs.transpose(2, 3)
        unfolded, whole = both.split(1, 2)
        return torch.where(self.previous, unfolded, torch.where(self.current, whole, 0.0))


def _shared(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`u [B, h, i, j] @ weight [h, j, l]`, with each head's weight read once for all rows."""
    rows, inputs = len(u), u.shape[2]
    out = torch.bmm(u.transpose(0, 1).flatten(1, 2), weight)
    return out.unflatten(1, (rows, inputs)).transpose(0, 1)


def _write_(state: MLPFastWeight, entries: Entries, exec_mask: torch.Tensor, learnt: torch.Tensor) -> None:
    """Store this step in the current mini-batch and move on by one position, in place, where `exec_mask`."""
    size = state.mini_batch_size
    row = torch.arange(len(exec_mask), device=exec_mask.device)
    place = state.position % (2 * size)
    for ring, new in zip(state.rings(), entries, strict=True):
        there = row, slice(None), place
        old = ring[there]
        ring[there] = torch.where(exec_mask[:, None, None], new[:, :, 0], old)
    state.wrote |= learnt
    ends = exec_mask & (state.position % size == size - 1)
    state.updates += ends & state.wrote
    state.wrote.logical_and_(~ends)
    state.position += exec_mask
