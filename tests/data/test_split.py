"""`python -m finetune.data split`: a data set in the public layout of DailyTalkContiguous becomes two lists."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from finetune.data.__main__ import main
from finetune.data.manifest import read_entries
from finetune.settings.command_line import load_args
from finetune.settings.sources import parse_sources
from tests.support.audio_files import noise, write_wav
from tests.support.datasets import MAIN
from tests.support.tiny_repository import ROOT

RATE = 44_100
"""Of the public data set; Mimi hears 24,000."""


def dailytalk(folder: Path, number: int = 20) -> Path:
    """Synthetic files in the layout of the data set: numbered stereo files, all words by Moshi's label."""
    (folder / "data_stereo").mkdir(parents=True)
    lines = []
    for index in range(number):
        pcm = noise(8, seed=index)
        write_wav(folder / "data_stereo" / f"{index}.wav", pcm, rate=RATE)
        words = [["hello", [0.02, 0.06], MAIN], ["there", [0.18, 0.3], MAIN]]
        (folder / "data_stereo" / f"{index}.json").write_text(json.dumps({"alignments": words}))
        lines.append({"path": f"data_stereo/{index}.wav", "duration": pcm.shape[1] / RATE})
    (folder / "dailytalk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def rewrite(folder: Path, change) -> None:
    """Lets `change` replace the lines of the list."""
    path = folder / "dailytalk.jsonl"
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def names(path: Path) -> list[str]:
    return [entry.path.name for entry in read_entries(path)[0]]


def lists(out: Path) -> tuple[list[str], list[str]]:
    return names(out / "train.jsonl"), names(out / "eval.jsonl")


def test_every_dialogue_is_in_one_list_and_found_from_there(tmp_path, capsys):
    folder, out = dailytalk(tmp_path / "DailyTalkContiguous"), tmp_path / "lists"
    assert main(["split", str(folder), str(out), "--held-out", "0.2"]) == 0
    train, held_out = lists(out)
    assert len(train) == 16
    assert len(held_out) == 4
    assert sorted(train + held_out) == sorted(f"{index}.wav" for index in range(20))
    lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert all(line["path"].startswith("../DailyTalkContiguous/data_stereo/") for line in lines)
    assert all(entry.path.is_file() for entry in read_entries(out / "train.jsonl")[0])
    assert "train.jsonl: 16 conversations" in capsys.readouterr().out
    assert main(["check", str(out)]) == 0


def test_the_choice_is_that_of_the_seed_and_not_of_the_order(tmp_path):
    folder = dailytalk(tmp_path / "a")
    assert main(["split", str(folder), str(tmp_path / "one"), "--held-out=0.3"]) == 0
    rewrite(folder, reversed)
    assert main(["split", str(folder / "dailytalk.jsonl"), str(tmp_path / "two"), "--held-out=0.3"]) == 0
    assert main(["split", str(folder), str(tmp_path / "three"), "--held-out=0.3", "--seed=1"]) == 0
    chosen = [set(lists(tmp_path / name)[1]) for name in ("one", "two", "three")]
    assert chosen[0] == chosen[1] != chosen[2]
    assert [len(one) for one in chosen] == [6, 6, 6]


def gone(folder: Path) -> None:
    (folder / "data_stereo" / "3.wav").unlink()


def without_words(folder: Path) -> None:
    (folder / "data_stereo" / "3.json").unlink()


def mono(folder: Path) -> None:
    write_wav(folder / "data_stereo" / "3.wav", noise(8, channels=1), rate=RATE)


def cut_off(folder: Path) -> None:
    path = folder / "data_stereo" / "3.wav"
    path.write_bytes(path.read_bytes()[:20_000])


def not_finite(folder: Path) -> None:
    pcm = noise(8)
    pcm[0, 100] = np.nan
    write_wav(folder / "data_stereo" / "3.wav", pcm, rate=RATE)


def another_duration(folder: Path) -> None:
    rewrite(folder, lambda lines: [line.replace('"duration": 0.', '"duration": 9.') if i == 3 else line
                                   for i, line in enumerate(lines)])  # fmt: skip


def not_json(folder: Path) -> None:
    rewrite(folder, lambda lines: ["{" if i == 3 else line for i, line in enumerate(lines)])


def leads_out(folder: Path) -> None:
    for end in (".wav", ".json"):
        os.link(folder / "data_stereo" / f"3{end}", folder.parent / f"3{end}")
    rewrite(folder, lambda lines: [line.replace("data_stereo/3.wav", "../3.wav") for line in lines])


def absolute(folder: Path) -> None:
    leads_out(folder)
    rewrite(folder, lambda lines: [line.replace("../3.wav", str(folder.parent / "3.wav")) for line in lines])


def listed_twice(folder: Path) -> None:
    rewrite(folder, lambda lines: [lines[2].replace("/2", "/./2") if i == 3 else line for i, line in enumerate(lines)])


def words_by_the_user(folder: Path) -> None:
    path = folder / "data_stereo" / "3.wav"
    pcm = noise(8)
    pcm[0] = 0
    write_wav(path, pcm, rate=RATE)


BROKEN = [gone, without_words, mono, cut_off, not_finite, another_duration, not_json, leads_out, absolute, listed_twice]
BROKEN += [words_by_the_user]


@pytest.mark.parametrize("break_one", BROKEN, ids=lambda one: one.__name__)
def test_a_broken_dialogue_is_left_out_in_one_line(tmp_path, capsys, break_one):
    folder, out = dailytalk(tmp_path / "a"), tmp_path / "out"
    break_one(folder)
    assert main(["split", str(folder), str(out)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    assert len(said) == 1
    assert f"{folder / 'dailytalk.jsonl'}:4: " in said[0]
    train, held_out = lists(out)
    assert sorted(train + held_out) == sorted(f"{index}.wav" for index in range(20) if index != 3)


def test_more_than_five_percent_broken_make_no_list(tmp_path, capsys):
    folder, out = dailytalk(tmp_path / "a"), tmp_path / "out"
    gone(folder)
    (folder / "data_stereo" / "4.json").write_text("{")
    assert main(["split", str(folder), str(out)]) == 1
    said = capsys.readouterr()
    assert "2 of 20 lines are broken, more than 5%" in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, capsys):
    folder = dailytalk(tmp_path / "a", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "none.jsonl").write_text("\n")
    os.link(folder / "dailytalk.jsonl", tmp_path / "one.jsonl")
    for source, out, named in (
        (folder, folder, "exists"),
        (tmp_path / "nosuch", tmp_path / "out", "no such file or folder"),
        (tmp_path / "empty", tmp_path / "out", "no list in it"),
        (tmp_path, tmp_path / "out", "2 lists (none.jsonl, one.jsonl)"),
        (tmp_path / "none.jsonl", tmp_path / "out", "0 good conversations"),
    ):
        assert main(["split", str(source), str(out)]) == 2
        assert named in capsys.readouterr().err
    for option, key in (
        ("--held-out=0", "held_out=0"),
        ("--held-out=1", "held_out=1"),
        ("--held-out=nan", "held_out=nan"),
        ("--seed=-1", "seed=-1"),
        ("--heldout=0.1", "did you mean --held-out"),
    ):
        assert main(["split", str(folder), str(tmp_path / "out"), option]) == 2
        assert key in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_is_not_called_empty(tmp_path, capsys, monkeypatch):
    def forbidden(folder):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "listdir", forbidden)
    monkeypatch.setattr(os, "scandir", forbidden)
    assert main(["split", str(tmp_path), str(tmp_path / "out")]) == 1
    assert "Permission denied" in capsys.readouterr().err


def test_a_terminal_that_cannot_show_a_name_is_shown_its_letters_by_number(tmp_path, monkeypatch):
    folder = dailytalk(tmp_path / "日", 2)
    said = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", said)
    assert main(["split", str(folder), str(tmp_path / "ü")]) == 0
    said.flush()
    assert rb"\xfc/train.jsonl: 1 conversations" in said.buffer.getvalue()


def test_two_dialogues_are_one_for_each_list(tmp_path):
    folder = dailytalk(tmp_path / "a", 2)
    assert main(["split", str(folder), str(tmp_path / "out"), "--held-out=0.9"]) == 0
    assert [len(one) for one in lists(tmp_path / "out")] == [1, 1]


def test_paths_hold_when_a_folder_on_the_way_is_a_link(tmp_path):
    folder = dailytalk(tmp_path / "disk" / "deep" / "a", 4)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    (tmp_path / "disk" / "other").mkdir()
    (tmp_path / "lists").symlink_to(tmp_path / "disk" / "other")
    assert main(["split", str(tmp_path / "link" / "a"), str(tmp_path / "lists" / "out")]) == 0
    assert all(entry.path.samefile(folder / "data_stereo" / entry.path.name)
               for entry in read_entries(tmp_path / "lists" / "out" / "train.jsonl")[0])  # fmt: skip


def linked(folder: Path, names: dict[str, str]) -> None:
    """Lists further dialogues: links, by their names, to files of the data set."""
    for name, target in names.items():
        for suffix in ("wav", "json"):
            (folder / "data_stereo" / f"{name}.{suffix}").symlink_to(f"{target}.{suffix}")
    line = json.loads((folder / "dailytalk.jsonl").read_text().splitlines()[0])
    more = [json.dumps(line | {"path": f"data_stereo/{name}.wav"}) for name in names]
    rewrite(folder, lambda lines: lines + more)


def test_a_dialogue_that_is_listed_again_by_a_link_is_in_one_list_alone(tmp_path, capsys):
    folder = dailytalk(tmp_path / "a")
    linked(folder, {"again": "3"})
    assert main(["split", str(folder), str(tmp_path / "out"), "--held-out=0.5"]) == 0
    assert "again.wav: listed twice" in capsys.readouterr().out
    train, held_out = lists(tmp_path / "out")
    assert sorted(train + held_out) == sorted(f"{index}.wav" for index in range(20))


def test_a_data_set_of_links_as_a_hub_keeps_it_is_split_as_it_is(tmp_path):
    folder = dailytalk(tmp_path / "a", 4)
    (folder / "data_stereo").rename(tmp_path / "blobs")
    (folder / "data_stereo").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (folder / "data_stereo" / file.name).symlink_to(file)
    assert main(["split", str(folder), str(tmp_path / "out")]) == 0
    assert all(entry.path.is_file() for entry in read_entries(tmp_path / "out" / "train.jsonl")[0])


def test_a_path_that_leads_out_over_a_link_is_left_out(tmp_path, capsys):
    folder = dailytalk(tmp_path / "a")
    for suffix in ("wav", "json"):
        (folder / "data_stereo" / f"3.{suffix}").rename(tmp_path / f"3.{suffix}")
    (folder / "data_stereo").rename(tmp_path / "elsewhere")
    (folder / "data_stereo").symlink_to(tmp_path / "elsewhere")
    rewrite(folder, lambda lines: [line.replace("data_stereo/3.wav", "data_stereo/../3.wav") for line in lines])
    assert main(["split", str(folder), str(tmp_path / "out")]) == 0
    assert "data_stereo/../3.wav: leads out of the folder of dailytalk.jsonl" in capsys.readouterr().out
    entries = [entry for name in ("train", "eval") for entry in read_entries(tmp_path / "out" / f"{name}.jsonl")[0]]
    assert len(entries) == 19
    assert all(entry.path.is_file() for entry in entries)


def test_the_example_trains_on_the_lists_that_its_commands_make(tmp_path, monkeypatch):
    (command,) = [line for line in (ROOT / "example" / "dailytalk.yaml").read_text().splitlines() if " split " in line]
    words = command.split("finetune.data ")[1].split()
    monkeypatch.chdir(tmp_path)
    dailytalk(Path(words[1]))
    assert main(words) == 0
    data = load_args(ROOT / "example" / "dailytalk.yaml").data
    assert [len(read_entries(file)[0]) for spec in (data.train_data, data.eval_data)
            for source in parse_sources(spec) for file in source.files] == [19, 1]  # fmt: skip
