"""The store of memories: what is read is what was written, of any kind of memory, for its owner and model alone."""

import fcntl
import os
import time

import pytest
import torch

from moshi_patch.memory import copy_memory
from moshi_patch.memory_stream import is_delta
from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.store_types import Kept, StoreError
from tests.support.memories import assert_same, streaming_model
from tests.support.memory_stores import file_of, key_file, model_and_memory, other_memory
from tests.support.models import ttt_settings

pytestmark = pytest.mark.usefixtures("patched")


@pytest.mark.parametrize("sealed", [False, True], ids=["plain", "sealed"])
def test_what_is_read_is_what_was_written_and_the_last_two_generations_stay(url, tmp_path, sealed):
    model, memory = model_and_memory()
    store = MemoryStore(url, model, key_file(tmp_path) if sealed else None)
    assert store.read("Anna") == Kept(None, 0)
    assert [store.write("Anna", other_memory(memory, n), n) for n in range(4)] == [1, 2, 3, 4]
    assert store.write("anna", memory, 0) == 1
    kept = store.read("Anna")
    assert kept.generation == 4
    assert_same(kept.memory, other_memory(memory, 3))
    assert_same(store.read("anna").memory, memory)
    anna, other = store.people()
    assert (anna.name, anna.generations, other.name, other.generations) == ("Anna", (3, 4), "anna", (1,))
    assert anna.total_size == 2 * anna.size > 10_000
    assert abs(anna.saved - time.time()) < 60
    assert store.forget("Anna") == 2
    assert store.read("Anna") == Kept(None, 0)
    assert [one.name for one in store.people()] == ["anna"]


def test_a_generation_means_something_to_its_own_model_alone(tmp_path):
    model, memory = model_and_memory()
    MemoryStore(tmp_path, model).write("anna", memory, 0)
    other = streaming_model(seed=1)
    with pytest.raises(StoreError, match="generation 1: this memory was made with another model or other settings"):
        MemoryStore(tmp_path, other).read("anna")
    slower = streaming_model(ttt_learning_rate=0.5)
    with pytest.raises(StoreError, match="other settings: ttt_learning_rate is"):
        MemoryStore(tmp_path, slower).read("anna")


@pytest.mark.parametrize(
    "kind", [{}, {"ttt_update": "residual"}, {"ttt_kind": "mlp"}], ids=["hebbian", "residual", "mlp"]
)
def test_every_kind_of_memory_is_kept_bit_for_bit_or_narrow(tmp_path, kind):
    model = streaming_model(1, **ttt_settings(**kind))
    memory = copy_memory(model, [0])
    store, narrow = MemoryStore(tmp_path, model), MemoryStore(tmp_path, model, dtype=torch.bfloat16)
    store.write("anna", memory, 0)
    narrow.write("otto", memory, 0)
    assert_same(store.read("anna").memory, memory)
    kept = store.read("otto").memory
    for key, tensor in memory.items():
        expected = tensor.bfloat16().float() if is_delta(key) else tensor
        assert kept[key].dtype == tensor.dtype
        assert torch.equal(kept[key], expected)
    saved = sum(tensor.nbytes for key, tensor in memory.items() if is_delta(key)) // 2
    full, less = store.people()
    assert 0 < saved <= full.size - less.size + 300


def test_a_fast_weight_that_is_not_finite_is_not_written(url):
    model, memory = model_and_memory()
    store = MemoryStore(url, model)
    with pytest.raises(StoreError, match=r"cannot be written: not saved, as .*\.delta .* is not finite"):
        store.write("anna", {k: t * torch.nan if k.endswith(".delta") else t for k, t in memory.items()}, 0)
    large = {k: torch.full_like(t, 3.4e38) if k.endswith(".delta") else t for k, t in memory.items()}
    with pytest.raises(StoreError, match="too large for bfloat16"):
        MemoryStore(url, model, dtype="bfloat16").write("anna", large, 0)
    assert store.people() == []


def test_a_folder_that_is_a_link_to_another_disk_is_forgotten_like_any(tmp_path):
    model, memory = model_and_memory()
    store = MemoryStore(tmp_path / "store", model)
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "anna").symlink_to(tmp_path / "disk")
    store.write("anna", memory, 0)
    assert store.forget("anna") == 1
    assert os.listdir(tmp_path / "store") == os.listdir(tmp_path / "disk") == []


def test_files_are_for_their_owner_alone_and_what_a_killed_writer_left_is_removed_by_forgetting(tmp_path):
    model, memory = model_and_memory()
    store = MemoryStore(tmp_path / "store", model)
    store.write("anna", memory, 0)
    assert file_of(store, "anna", 1).stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "store" / "anna").stat().st_mode & 0o777 == 0o700
    left = tmp_path / "store" / "anna" / ".0000000002.0123.partial"
    with left.open("wb") as file:  # its writer still lives
        fcntl.flock(file, fcntl.LOCK_EX)
        store.write("anna", memory, 1)
        assert left.exists()
    store.write("anna", memory, 2)
    assert not left.exists()
    left.write_bytes(b"some of what anna said")
    store.forget("anna")
    assert os.listdir(tmp_path / "store") == []
