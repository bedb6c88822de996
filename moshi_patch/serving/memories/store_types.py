"""What a store of memories gives and raises."""

from dataclasses import dataclass

import torch


class StoreError(Exception):
    """The store cannot do what it should; one line says why. It names no person, and so can be logged."""


class Unavailable(StoreError):
    """The store or its disk refused or gave no answer, which may be otherwise in a while."""


class Lost(StoreError):
    """Somebody else has written this person's memory, or it was forgotten: what is in this stream has no place."""


@dataclass(frozen=True)
class Kept:
    """What the store has of a person.

    Attributes:
        memory: tensors on the CPU, as of :func:`moshi_patch.memory.copy_memory`; None: nothing yet.
        generation: its number, to be given to :meth:`MemoryStore.write`; 0: nothing yet.
    """

    memory: dict[str, torch.Tensor] | None
    generation: int


@dataclass(frozen=True)
class Person:
    """A line of :meth:`MemoryStore.people`: the newest generation.

    Attributes:
        generations: all that are there, the oldest first.
        size: of the newest in bytes, and `total_size` of all.
        saved: seconds since 1970, by the clock of the store.
    """

    name: str
    generations: tuple[int, ...]
    size: int
    total_size: int
    saved: float

    @property
    def generation(self) -> int:
        return self.generations[-1]
