"""The store of memories: what is read is what was written, by one writer alone, or an error of one line."""

import errno
import fcntl
import os
import threading
import time
import uuid

import pytest
import torch

import moshi_patch
from moshi_patch.memory import copy_memory
from moshi_patch.memory_stream import is_delta
from moshi_patch.serving.store import MemoryStore
from moshi_patch.serving.store_types import Kept, Lost, StoreError, Unavailable
from tests.support.disks import largest_file
from tests.support.memories import assert_same, streaming_model
from tests.support.memory_stores import file_of, key_file, model_and_memory, number_in, other_memory
from tests.support.models import ttt_settings

pytestmark = pytest.mark.usefixtures("patched")


@pytest.fixture(params=["folder", "memory"])
def url(request, tmp_path) -> str:
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/people"


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


def test_a_write_after_somebody_elses_is_lost_and_changes_nothing(url):
    model, memory = model_and_memory()
    mine, theirs = MemoryStore(url, model), MemoryStore(url, model)
    assert mine.write("anna", memory, 0) == 1
    assert theirs.read("anna").generation == 1
    assert theirs.write("anna", other_memory(memory, 7), 1) == 2
    for generation in (0, 1):
        with pytest.raises(Lost, match="somebody else has written generation 2 of this person's memory"):
            mine.write("anna", memory, generation)
    assert number_in(mine.read("anna").memory) == 7


def test_a_server_that_is_far_behind_is_lost_although_its_next_name_is_free_again(url):
    model, memory = model_and_memory()
    behind, ahead = MemoryStore(url, model), MemoryStore(url, model)
    behind.write("anna", memory, 0)
    for generation in range(1, 6):
        ahead.write("anna", memory, generation)
    with pytest.raises(Lost):
        behind.write("anna", memory, 1)
    assert ahead.people()[0].generations == (5, 6)


def test_a_write_that_was_overtaken_while_it_was_under_way_takes_itself_back(url):
    """The name that it creates was used, and is free again."""
    model, memory = model_and_memory()
    behind, ahead = MemoryStore(url, model), MemoryStore(url, model)
    behind.write("anna", memory, 0)
    create = behind.files.create

    def late(*args) -> None:
        for generation in range(1, 6):
            ahead.write("anna", memory, generation)
        create(*args[:-1], lambda: None)

    behind.files.create = late
    with pytest.raises(Lost, match="generation 6"):
        behind.write("anna", memory, 1)
    assert ahead.people()[0].generations == (5, 6)


def test_an_upload_that_arrived_and_was_sent_again_is_no_loss(url):
    model, memory = model_and_memory()
    store = MemoryStore(url, model)
    create = store.files.create

    def twice(*args) -> None:
        create(*args)
        raise FileExistsError("412 Precondition Failed")

    store.files.create = twice
    assert store.write("anna", memory, 0) == 1
    assert store.write("anna", other_memory(memory, 1), 1) == 2
    assert number_in(store.read("anna").memory) == 1
    with pytest.raises(Lost):
        MemoryStore(url, model).write("anna", memory, 1)


def test_after_forgetting_a_write_that_goes_on_from_before_is_lost(url):
    model, memory = model_and_memory()
    mine, other = MemoryStore(url, model), MemoryStore(url, model)
    mine.write("anna", memory, 0)
    assert other.forget("anna") == 1
    with pytest.raises(Lost, match="generation 1 is gone: it was forgotten"):
        mine.write("anna", memory, 1)
    assert other.people() == []
    assert other.write("anna", other_memory(memory, 5), 0) == 1  # somebody begins anew
    with pytest.raises(Lost, match="it was forgotten, and somebody else began anew"):
        mine.write("anna", memory, 1)
    assert number_in(mine.read("anna").memory) == 5
    assert mine.write("anna", memory, 1) == 2


def test_forgetting_meets_a_write_under_way_and_nothing_is_left(url):
    model, memory = model_and_memory()
    mine, other = MemoryStore(url, model), MemoryStore(url, model)
    mine.write("anna", memory, 0)
    create = mine.files.create
    mine.files.create = lambda *args: (other.forget("anna"), create(*args[:-1], lambda: None))
    with pytest.raises(Lost, match="forgotten"):
        mine.write("anna", memory, 1)
    assert mine.files.list() == []


def test_forgetting_meets_the_first_write_of_a_person_and_it_does_not_come_back(tmp_path):
    model, memory = model_and_memory()
    mine, other = MemoryStore(tmp_path, model), MemoryStore(tmp_path, model)
    create = mine.files.create
    mine.files.create = lambda *args: create(*args[:-1], lambda: other.forget("anna"))
    with pytest.raises(Lost, match="it was forgotten while it was written"):
        mine.write("anna", memory, 0)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_a_link_to_another_disk_is_forgotten_like_any(tmp_path):
    model, memory = model_and_memory()
    store = MemoryStore(tmp_path / "store", model)
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "anna").symlink_to(tmp_path / "disk")
    store.write("anna", memory, 0)
    assert store.forget("anna") == 1
    assert os.listdir(tmp_path / "store") == os.listdir(tmp_path / "disk") == []


def test_a_pipe_in_place_of_a_generation_is_not_waited_for(tmp_path):
    store = MemoryStore(tmp_path, model_and_memory()[0])
    (tmp_path / "anna").mkdir()
    os.mkfifo(tmp_path / "anna" / "0000000001")
    begin = time.monotonic()
    with pytest.raises(StoreError, match="cannot be read"):
        store.read("anna")
    assert time.monotonic() - begin < 10
    assert store.forget("anna") == 1


def test_of_many_racing_threads_one_writes_each_generation(url):
    model, memory = model_and_memory()
    known = moshi_patch.fingerprint(model)
    stores = [MemoryStore(url, model, known=known) for _ in range(4)]
    won: list[list[int]] = [[] for _ in stores]
    gate = threading.Barrier(len(stores))

    def race(number: int) -> None:
        for generation in range(6):
            gate.wait()
            try:
                assert stores[number].write("anna", other_memory(memory, number), generation) == generation + 1
                won[number].append(generation + 1)
            except Lost:
                pass

    threads = [threading.Thread(target=race, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(generation for ones in won for generation in ones) == [1, 2, 3, 4, 5, 6]
    assert 6 in won[number_in(stores[0].read("anna").memory)]


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


@pytest.mark.parametrize("room", [0, 100, 6_000], ids=["none", "for_the_start", "for_a_part"])
def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, room):
    model, memory = model_and_memory()
    store = MemoryStore(tmp_path / "store", model)
    store.write("anna", memory, 0)
    with largest_file(room), pytest.raises(Unavailable, match=r"store: cannot be written: File too large\.$"):
        store.write("anna", other_memory(memory, 3), 1)
    assert_same(store.read("anna").memory, memory)
    assert os.listdir(tmp_path / "store" / "anna") == ["0000000001"]


def test_a_store_that_cannot_be_used_is_one_line(tmp_path):
    model, memory = model_and_memory()
    (tmp_path / "file").write_text("")
    for url, reason in (
        (tmp_path / "file", "Not a directory"),
        (tmp_path / "file" / "store", "Not a directory"),
        (tmp_path / ("m" * 300), "File name too long"),
    ):
        with pytest.raises(StoreError, match=reason) as refused:
            MemoryStore(url, model).write("anna", memory, 0)
        assert "\n" not in str(refused.value)
    for url, reason in (
        ("nosuch://place", "two servers might write one file there"),
        ("http://user:secret@host/store", "^http://host/store: two servers"),
        ("simplecache::s3://bucket/x", "two servers might"),
        ("memory://", "must name a folder"),
        ("", "must be a folder, or a URL"),
        ("s3:/bucket/folder", "must be a folder, or a URL"),
        ("file://", "must be a folder, or a URL"),
    ):
        with pytest.raises(StoreError, match=reason):
            MemoryStore(url, model)
    with pytest.raises(StoreError, match="dtype=float16: must be one of float32, bfloat16"):
        MemoryStore(tmp_path, model, dtype=torch.float16)
    with pytest.raises(StoreError, match="generation=-1: must be a whole number"):
        MemoryStore(tmp_path, model).write("anna", memory, -1)
    with pytest.raises(StoreError, match="cannot be a person's name"):
        MemoryStore(tmp_path, model).read("a\nb")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError('cannot connect: "http://host/bucket?prefix=people%2Fanna%2F&x=1".\nTry again'),
        FileNotFoundError("bucket/people/anna/0000000001"),
        PermissionError(13, "Permission denied", "/people/anna/0000000001"),
        ConnectionError("people/anna"),
    ],
)
def test_what_a_store_says_is_one_line_that_names_nobody(tmp_path, error):
    store = MemoryStore(tmp_path / "store", None)

    def refuse(folder=None) -> list:
        raise error

    store.files.list = refuse
    with pytest.raises(Unavailable, match=r"store: cannot be read: .+\.$") as refused:
        store.read("anna")
    assert "anna" not in str(refused.value).replace(str(tmp_path), "")
    assert "\n" not in str(refused.value)


def test_whether_a_store_can_be_used_is_known_before_anything_is_kept(url, tmp_path):
    MemoryStore(url, None).check()
    assert MemoryStore(url, None).people() == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/store: cannot be used: Not a directory\.$"):
        MemoryStore(tmp_path / "file" / "store", None).check()
    store = MemoryStore(tmp_path / "other", None)
    with largest_file(0), pytest.raises(StoreError, match=r"cannot be used: File too large"):
        store.check()
    assert os.listdir(tmp_path / "other") == []


def test_a_disk_without_links_is_told(tmp_path, monkeypatch):
    def link(*args) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(
        StoreError, match=r"cannot be used: its disk has no links, by which a file is made by one alone"
    ):
        MemoryStore(tmp_path, None).check()
    assert os.listdir(tmp_path) == []


def test_a_store_that_does_not_answer_is_given_up_in_time_and_its_late_write_never_appears(tmp_path):
    model, memory = model_and_memory()
    store = MemoryStore(tmp_path, model, timeout_s=0.3)
    answer, create = threading.Event(), store.files.create

    def late(*args) -> None:
        answer.wait(20)
        create(*args)

    store.files.create = late
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"no answer within 0\.3"):
        store.write("anna", memory, 0)
    assert time.monotonic() - began < 5
    answer.set()
    time.sleep(0.3)
    assert store.read("anna") == Kept(None, 0)


def test_a_dead_store_holds_a_few_threads_and_no_more(tmp_path):
    store = MemoryStore(tmp_path, None, timeout_s=0.02)
    answer = threading.Event()
    store.files.list = lambda folder=None: answer.wait(20) and []
    for _ in range(4):
        with pytest.raises(Unavailable, match="no answer"):
            store.people()
    with pytest.raises(Unavailable, match="4 earlier calls still wait"):
        store.people()
    answer.set()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert store.people() == []
            return
        except Unavailable:
            time.sleep(0.01)
    raise AssertionError("it never answers again")


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
