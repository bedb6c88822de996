"""A store that is full, silent, or none: an error of one line that names nobody, in time, and what was there stays."""

import errno
import os
import threading
import time

import pytest
import torch

from moshi_patch.serving.memories.store import MemoryStore
from moshi_patch.serving.memories.store_types import Kept, StoreError, Unavailable
from tests.support.disks import largest_file
from tests.support.memories import assert_same
from tests.support.memory_stores import model_and_memory, other_memory

pytestmark = pytest.mark.usefixtures("patched")


def test_a_pipe_in_place_of_a_generation_is_not_waited_for(tmp_path):
    store = MemoryStore(tmp_path, model_and_memory()[0])
    (tmp_path / "anna").mkdir()
    os.mkfifo(tmp_path / "anna" / "0000000001")
    begin = time.monotonic()
    with pytest.raises(StoreError, match="cannot be read"):
        store.read("anna")
    assert time.monotonic() - begin < 10
    assert store.forget("anna") == 1


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
