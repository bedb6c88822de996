"""Shared by the tests of stores: a store with small memories, and files that are spoilt."""

import functools
import secrets
from pathlib import Path

import torch

from moshi_patch.memory import copy_memory
from moshi_patch.memory_stream import is_delta
from moshi_patch.serving.memories.store import MemoryStore
from tests.support.memories import streaming_model


@functools.cache
def model_and_memory() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model that streams two rows, and what its second row has learnt; not to be changed."""
    model = streaming_model()
    return model, copy_memory(model, [1])


def other_memory(memory: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """One that holds `number` in all of its deltas."""
    return {key: torch.full_like(t, number) if is_delta(key) else t for key, t in memory.items()}


def number_in(memory: dict[str, torch.Tensor]) -> int:
    """What :func:`other_memory` was made of; all of it must agree."""
    numbers = {float(one) for key, t in memory.items() if is_delta(key) for one in t.unique()}
    assert len(numbers) == 1, numbers
    return int(numbers.pop())


def key_file(folder: Path, name: str = "key") -> Path:
    path = folder / name
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


def file_of(store: MemoryStore, folder: str, generation: int) -> Path:
    return store.files.root / folder / f"{generation:010d}"
