"""What one layer of TTT-MLP remembers while streaming: `MLPFastWeight`.

Shapes: `B` rows, `h` heads, `d` head width, `n` hidden width (4d), `C` mini-batch size.

All steps of a mini-batch take their gradients at the weights it began with, and read with their own updates. So the
state is what was learnt up to the mini-batch before, and the entries of that one and of this one. The update of a
finished mini-batch is not added to the deltas in one go: at each step of the next one `ceil((d + 1) / C)` input rows of
the first layer's are, and `ceil((n + 1) / C)` of the second's. Until its turn comes, a row's share is computed from
the entries. Every step costs the same.
"""

from dataclasses import dataclass, fields

import torch

from ...rows import fill_rows_
from .mini_batch import Entries, Layers, MLPDelta, learnt


@dataclass
class MLPFastWeight:
    """Everything one layer remembers of `B` streams. A fresh stream is all zeros.

    Layers have their bias as a last input row, inputs a last one for it; entries are as in `Entries`.

    Attributes:
        delta1, delta2: `[B, h, d + 1, n]` and `[B, h, n + 1, d]`, at least float32: all updates up to the mini-batch
            before the previous one, and the input rows of the previous one's update that were added so far.
        keys, hidden, grad1, grad2: `[B, h, 2C, *]`, rings of the entries of the current and the previous mini-batch:
            position p stands at `p % 2C`.
        position: `[B]` int64, steps since the row's last reset.
        updates: `[B]` int64, finished mini-batches since the row's last reset in which something was learnt.
        wrote: `[B]` bool, whether something was learnt in the current mini-batch.
    """

    delta1: torch.Tensor
    delta2: torch.Tensor
    keys: torch.Tensor
    hidden: torch.Tensor
    grad1: torch.Tensor
    grad2: torch.Tensor
    position: torch.Tensor
    updates: torch.Tensor
    wrote: torch.Tensor

    @classmethod
    def allocate(
        cls,
        batch_size: int,
        heads: int,
        width: int,
        hidden: int,
        mini_batch_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> "MLPFastWeight":
        """The state of `batch_size` fresh streams. `width` is d, `hidden` is n; `dtype` is float32 at least."""
        floats = {"dtype": torch.promote_types(dtype, torch.float32), "device": device}
        entries = batch_size, heads, 2 * mini_batch_size
        return cls(
            delta1=torch.zeros(batch_size, heads, width + 1, hidden, **floats),
            delta2=torch.zeros(batch_size, heads, hidden + 1, width, **floats),
            keys=torch.zeros(*entries, width + 1, **floats),
            hidden=torch.zeros(*entries, hidden + 1, **floats),
            grad1=torch.zeros(*entries, hidden, **floats),
            grad2=torch.zeros(*entries, width, **floats),
            position=torch.zeros(batch_size, dtype=torch.int64, device=device),
            updates=torch.zeros(batch_size, dtype=torch.int64, device=device),
            wrote=torch.zeros(batch_size, dtype=torch.bool, device=device),
        )

    def reset(self, reset_mask: torch.Tensor) -> None:
        """Make the rows where `reset_mask [B]` is true bitwise those of a fresh stream, in place."""
        for field in fields(self):
            fill_rows_(getattr(self, field.name), reset_mask, 0)

    @property
    def mini_batch_size(self) -> int:
        return self.keys.shape[2] // 2

    def untouched(self) -> bool:
        """Whether no row has learnt anything since its last reset. Waits for the device: not for every step."""
        return not (self.wrote | (self.updates > 0)).any()

    def rings(self) -> Entries:
        """All entries, `[B, h, 2C, *]`: no copies."""
        return Entries(self.keys, self.hidden, self.grad1, self.grad2)

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, 2C]` bool each: which places of the rings hold the previous mini-batch, and which the current one.

        The previous one's are all zero during the first; the current one's are those of steps that were taken.
        """
        size = self.mini_batch_size
        place = torch.arange(2 * size, device=self.keys.device)
        previous = place // size != (self.position // size % 2)[:, None]
        return previous, ~previous & (place % size < (self.position % size)[:, None])

    def unfolded(self, layer: torch.Tensor) -> torch.Tensor:
        """`[B, inputs]` bool: the input rows of `layer`, delta1 or delta2, that still lack the previous update."""
        inputs, size = layer.shape[2], self.mini_batch_size
        folded = self.position % size * rows_per_step(inputs, size)
        return torch.arange(inputs, device=layer.device) >= folded[:, None]

    def at_start(self) -> Layers:
        """`[B, h, *]`: what was learnt up to the start of the current mini-batch. Allocates it."""
        deltas = Layers(self.delta1, self.delta2)
        whole = learnt(deltas, _masked(self.rings(), self.places()[0]))
        return Layers(
            *(
                torch.where(self.unfolded(old)[:, None, :, None], new, old)
                for new, old in zip(whole, deltas, strict=True)
            )
        )

    def full_delta(self) -> MLPDelta:
        """What was learnt up to now: fast weights in force minus those of a fresh stream. Allocates it; for reports."""
        return learnt(self.at_start(), _masked(self.rings(), self.places()[1])).split()


def rows_per_step(inputs: int, mini_batch_size: int) -> int:
    """Input rows of a layer that each step folds, so that C steps fold all."""
    return -(-inputs // mini_batch_size)


def _masked(entries: Entries, mask: torch.Tensor) -> Entries:
    """`entries` that teach nothing where `mask [B, 2C]` is false."""
    mask = mask[:, None, :, None]
    return entries._replace(grad1=torch.where(mask, entries.grad1, 0.0), grad2=torch.where(mask, entries.grad2, 0.0))
