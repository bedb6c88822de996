"""A file or folder that is written appears whole or not at all, and what stood there before stays until then."""

import os

import pytest

from finetune.common.differences import differences, differing_keys
from finetune.common.errors import ConfigError
from finetune.common.files import read_json, whole_file, whole_folder, write_json, write_whole
from tests.support.disks import largest_file


def test_a_file_is_replaced_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_a_file_that_fails_on_the_way_leaves_the_old_one_alone(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")

    def write():
        with whole_file(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_that_was_never_written_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_file_alone(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    with largest_file(100), pytest.raises(OSError, match="too large"):
        write_json(tmp_path / "a.json", {"a": "x" * 10_000})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_folder_appears_when_all_of_it_is_there(tmp_path):
    with whole_folder(tmp_path / "new" / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert os.listdir(tmp_path / "new") == [folder.name]
        assert folder.name.startswith(".tmp-out-")
    assert (tmp_path / "new" / "out" / "sub" / "file").read_text() == "x"
    assert (tmp_path / "new" / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_that_fails_on_the_way_is_gone(tmp_path, error):
    def write():
        with whole_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise error

    with pytest.raises(error):
        write()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing"])
def test_json_is_read_from_files_alone(tmp_path, kind):
    path = tmp_path / "a.json"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(ConfigError, match=r"a\.json: cannot be read \(No such file"):
        read_json(path)


def test_differences_are_of_all_keys_or_of_those_that_are_named():
    one, other = {"a": 1, "b": None, "c": [1]}, {"a": 1, "c": [2], "d": 4}
    assert differing_keys(one, other) == ["c", "d"]
    assert differences(one, other, keys=["a", "d"]) == ["d=None, not 4"]
    assert differences(one, other, "{key}: {one} here, {other} there", ["c"]) == ["c: [1] here, [2] there"]
