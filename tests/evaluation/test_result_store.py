"""What an evaluation has found outlives the process that found it, and is never taken for something else."""

import json
import math

import pytest

from finetune.common.files import finite_or_none, write_whole
from finetune.evaluation.result_store import ResultStore, file_identity, fingerprint, tree_identity

KIND = "standard/updates on"


def known(store: ResultStore) -> list[str]:
    """Which of the items that these tests use have values."""
    names = ("first", "second", "third", *(f"item {rank}" for rank in range(3)))
    return [name for name in names if store.get(KIND, name) is not None]


def test_a_later_run_finds_the_very_numbers(tmp_path):
    values = {"sums": [0.1 + 0.2, 1e-300, 3], "note": "η"}
    ResultStore(tmp_path, "a").add(KIND, "x.wav#0", values)
    again = ResultStore(tmp_path, "a")
    assert again.get(KIND, "x.wav#0") == values
    assert again.get("standard/updates off", "x.wav#0") is None
    assert again.get(KIND, "y.wav#0") is None


def test_results_of_another_fingerprint_are_never_seen(tmp_path):
    ResultStore(tmp_path, "a").add(KIND, "x", {"loss": 1})
    assert ResultStore(tmp_path, "b").get(KIND, "x") is None


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_line_that_was_cut_short_is_dropped_and_the_next_one_is_whole(tmp_path, cut):
    store = ResultStore(tmp_path, "a")
    for item in ("first", "second"):
        store.add(KIND, item, {"loss": 1.5})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    again = ResultStore(tmp_path, "a")
    assert known(again) == ["first"]
    again.add(KIND, "third", {"loss": 2.5})
    assert known(ResultStore(tmp_path, "a")) == ["first", "third"]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_noise_among_the_lines_costs_its_own_line_alone(tmp_path):
    store = ResultStore(tmp_path, "a")
    store.add(KIND, "first", {"loss": 1.5})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes() + b'\x00\xff\x00\n["no object"]\n')
    store.add(KIND, "second", {"loss": 1.5})
    assert known(ResultStore(tmp_path, "a")) == ["first", "second"]


def test_ranks_write_files_of_their_own_and_read_all(tmp_path):
    ranks = [ResultStore(tmp_path, "a", rank) for rank in range(3)]
    for rank, store in enumerate(ranks):
        store.add(KIND, f"item {rank}", {"rank": rank})
    assert known(ranks[0]) == ["item 0"]
    for store in ranks:
        store.refresh()
        assert len(known(store)) == 3
    assert len(list(tmp_path.iterdir())) == 3
    assert len(known(ResultStore(tmp_path, "a", 0))) == 3, "fewer ranks go on with what more have done"


def test_a_fingerprint_tells_settings_and_changed_files_apart(tmp_path):
    assert fingerprint(a=1, b=[2.0]) == fingerprint(b=[2.0], a=1)
    assert fingerprint(a=1) != fingerprint(a=2)
    file = tmp_path / "a.wav"
    file.write_text("one")
    before, tree = file_identity(file), tree_identity(tmp_path)
    assert (file_identity(file), tree_identity(tmp_path)) == (before, tree)
    file.write_text("four")
    assert file_identity(file) != before
    assert tree_identity(tmp_path) != tree
    assert tree_identity(file) == file_identity(file)


def test_a_file_is_replaced_as_a_whole_and_json_stays_strict(tmp_path):
    write_whole(tmp_path / "eval.json", "first")
    content = finite_or_none({"loss": math.nan, "rows": [1.0, math.inf, (2, "text", None)]})
    write_whole(tmp_path / "eval.json", json.dumps(content, allow_nan=False))
    assert json.loads((tmp_path / "eval.json").read_text()) == {"loss": None, "rows": [1.0, None, [2, "text", None]]}
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]
