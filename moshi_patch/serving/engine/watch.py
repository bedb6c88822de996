"""What somebody is told about their own memory: read of one row, a layer at a time, while no step is due."""

import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...model import ttt_memories
from .person import Person, Told


class Watch:
    """Looks at the fast weights of the people who asked for it. Used by the model's thread.

    Args:
        model: it streams.
        every_s: seconds between two messages to one person.
    """

    def __init__(self, model: nn.Module, every_s: float):
        self._memories, self._every_s = ttt_memories(model), every_s
        self._initial: dict[str, float] = {}
        self._looking: dict[Person, tuple[Iterator[dict[str, Any]], list[dict[str, Any]]]] = {}

    def due_in(self, people: list[Person], now: float) -> float:
        """Seconds until somebody is to be told."""
        return max(0.0, min((person.told + self._every_s - now for person in people if person.metadata), default=60.0))

    def look(self, people: list[Person], now: float) -> tuple[Person, Told] | None:
        """Looks at one layer of one person; the message when it was the last one."""
        for gone in self._looking.keys() - set(people):
            del self._looking[gone]
        due = [person for person in people if person.metadata and now >= person.told + self._every_s]
        if not due:
            return None
        person = min(due, key=lambda person: person.told)
        layers, seen = self._looking.setdefault(person, (self.layers(person.row), []))
        if (layer := next(layers, None)) is not None:
            seen.append(layer)
            return None
        del self._looking[person]
        person.told = time.monotonic()
        return person, Told(
            {
                "type": "memory",
                "layers": seen,
                "updates": person.updates,
                "step_ms": round(person.step_ms, 3),
                "waiting_frames": len(person.frames),
                "dropped_frames": person.dropped,
            }
        )

    def layers(self, row: int) -> Iterator[dict[str, Any]]:
        """Of each TTT layer of a row, when its turn comes: `layer`, `relative_delta`, `known`, `chunk_filled`."""
        for name, memory in self._memories.items():
            one = row_of(memory, row)
            if name not in self._initial:
                self._initial[name] = memory.initial_norm().item()
            known = one.known()  # the rest of its figures is of weights that do not change
            position, size = one._streaming_state.fast.position.item(), one.update_steps
            yield {
                "layer": layer_number(name),
                "relative_delta": finite(one.delta_norm().item() / self._initial[name]),
                "known": known and finite(known[0]),
                "chunk_filled": position % size / size,
            }


def row_of(memory: nn.Module, row: int) -> nn.Module:
    """The memory of one row alone: it shares the row's tensors and copies none."""
    state = copy.copy(memory._streaming_state)
    fast = state.fast
    state.fast = dataclasses.replace(
        fast, **{field.name: getattr(fast, field.name)[row : row + 1] for field in dataclasses.fields(fast)}
    )
    one = copy.copy(memory)
    one._streaming_state = state
    return one


def layer_number(name: str) -> int | str:
    """The number of the layer in a name such as `transformer.layers.5.gating`; else the name."""
    return next((int(part) for part in reversed(name.split(".")) if part.isdecimal()), name)


def finite(number: float | None) -> float | None:
    """JSON has no NaN."""
    return number if number is not None and math.isfinite(number) else None
