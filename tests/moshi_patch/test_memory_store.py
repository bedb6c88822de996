"""`moshi-ttt memory`: who has a memory, what it says of itself, a file of it, and forgetting it, without a model."""

import dataclasses
import io
import json
import re

import pytest
import torch

import moshi_patch
import moshi_ttt
from moshi_patch.memory import fast_weight_tensors
from moshi_patch.serving.memories.store import MemoryStore
from tests.support.memories import streaming_model
from tests.support.memory_stores import file_of, key_file, model_and_memory, other_memory

pytestmark = pytest.mark.usefixtures("patched")


@pytest.fixture(params=["plain", "sealed"])
def store(request, tmp_path) -> tuple[MemoryStore, list[str]]:
    """A store with two people, and the options that open it."""
    model, memory = model_and_memory()
    key = key_file(tmp_path) if request.param == "sealed" else None
    store = MemoryStore(tmp_path / "store", model, key, "bfloat16")
    for generation in range(3):
        store.write("Анна", other_memory(memory, generation), generation)
    store.write("../otto", memory, 0)
    return store, ["--memory-dir", str(tmp_path / "store")], ["--key-file", str(key)] if key else []


def run(capsys, *words) -> str:
    assert moshi_ttt.main(["memory", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    assert moshi_ttt.main(["memory", *map(str, words)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    return err


def test_people_are_listed_shown_exported_and_forgotten(store, capsys, tmp_path):
    store, place, key = store
    *people, total = run(capsys, "list", *place).splitlines()
    assert [line.split("\t")[:2] for line in people] == [["../otto", "generation 1"], ["Анна", "generation 2, 3"]]
    assert total.startswith("2 people, 0.0")
    assert json.loads(run(capsys, "list", "--json", *place))[1]["generations"] == [2, 3]

    shown = run(capsys, "show", *place, *key, "Анна")
    assert "Анна, generation 3, written 20" in shown
    assert "deltas    bfloat16" in shown
    assert "ttt_chunk_size            5" in shown
    assert json.loads(run(capsys, "show", "--json", *place, *key, "Анна", "--generation", 2))["generation"] == 2

    assert run(capsys, "export", *place, *key, "Анна", tmp_path / "file") == f"{tmp_path / 'file'}\n"
    model = streaming_model(1)
    moshi_patch.load_memory(model, tmp_path / "file")
    deltas = [tensor for name, tensor in fast_weight_tensors(model).items() if name.endswith(".delta")]
    assert all(torch.equal(delta, torch.full_like(delta, 2)) for delta in deltas)

    assert run(capsys, "forget", *place, "Анна", "nobody") == "Анна: 2 generations removed\nnobody: nothing was there\n"
    assert [person.name for person in store.people()] == ["../otto"]


def test_what_cannot_be_shown_is_one_line(store, capsys, tmp_path):
    _, place, key = store
    assert "has nothing of this person" in refused(capsys, "show", *place, *key, "nobody")
    assert "has no generation 1 of this person, only [2, 3]" in refused(
        capsys, "export", *place, *key, "Анна", tmp_path / "file", "--generation", 1
    )
    assert "cannot be a person's name" in refused(capsys, "forget", *place, "a\nb")
    for command in (["list"], ["show", "anna"], ["forget", "anna"], ["export", "anna", tmp_path / "file"]):
        assert "nosuch: there is no such store." in refused(capsys, *command, "--memory-dir", tmp_path / "nosuch")
    assert not (tmp_path / "nosuch").exists()
    assert "No such file" in refused(capsys, "export", *place, *key, "Анна", tmp_path / "nosuch" / "file")
    other = ["--key-file", key_file(tmp_path, "other")]
    reason = "is not the one that it was encrypted with" if key else "it is not encrypted, but the key in"
    assert reason in refused(capsys, "show", *place, *other, "Анна")
    if key:
        assert "it is encrypted, and can be read with the key" in refused(capsys, "show", *place, "Анна")
    for target in (tmp_path / "nosuch" / "file", tmp_path, ""):
        assert f"cannot be exported: {target}: cannot be written (" in refused(
            capsys, "export", *place, *key, "Анна", target
        )


def test_who_cannot_be_forgotten_is_told_before_anybody_is(store, capsys):
    store, place, _ = store
    assert "cannot be a person's name" in refused(capsys, "forget", *place, "Анна", "a\nb")
    assert [person.generations for person in store.people()] == [(1,), (2, 3)]


WRONG = ("memory", "memory list", "memory show --memory-dir x", "memory forget --memory-dir x", "memory purge")
WRONG += (
    "memory show --memory-dir x anna --generation new",
    "serve",
    "serve --hf-repo x --rows many",
    "serve --x",
)


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_one_line(capsys, words):
    with pytest.raises(SystemExit) as wrong:
        moshi_ttt.main(words.split())
    assert wrong.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"moshi-ttt {words.split()[0]}")


def test_what_a_file_says_of_itself_steers_no_terminal(capsys, tmp_path):
    model, memory = model_and_memory()
    owner = {"settings": {"\x1b[31m": "\x1b]0;x\x07"}, "weights": {}}
    store = MemoryStore(tmp_path / "store", model, known=owner)
    store.write("anna", memory, 0)
    path = file_of(store, "anna", 1)
    path.write_bytes(re.sub(rb'("saved": ")20....', rb"\1\\u001b", path.read_bytes()))
    shown = run(capsys, "show", "--memory-dir", tmp_path / "store", "anna")
    assert "\\x1b[31m" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


class Gone(io.StringIO):
    """A pipe whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_went_away_is_one_line(capsys, tmp_path, monkeypatch):
    model, memory = model_and_memory()
    MemoryStore(tmp_path / "store", model).write("anna", memory, 0)
    monkeypatch.setattr("sys.stdout", Gone())
    assert moshi_ttt.main(["memory", "list", "--memory-dir", str(tmp_path / "store")]) == 1
    assert capsys.readouterr().err == "moshi-ttt memory: what was found cannot be printed (Broken pipe).\n"


def test_a_clock_that_was_wrong_by_thousands_of_years_is_shown(capsys, tmp_path, monkeypatch):
    model, memory = model_and_memory()
    store = MemoryStore(tmp_path / "store", model)
    store.write("anna", memory, 0)
    listed = store.people()[0]
    monkeypatch.setattr(MemoryStore, "people", lambda self: [dataclasses.replace(listed, saved=1e13)])
    assert "10000000000000 s after 1970" in run(capsys, "list", "--memory-dir", tmp_path / "store")
