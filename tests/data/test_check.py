"""Data: what users write is checked, line by line, by the reader and by `python -m finetune.data check`."""

import json
import os

import pytest

from finetune.data.__main__ import main as data_main
from finetune.data.broken import BrokenItem
from finetune.data.manifest import read_entries, read_transcript
from finetune.data.segments import Segment
from finetune.settings.sources import parse_sources
from tests.support.datasets import MAIN, USER, make_tokenizer, write_dataset
from tests.support.tiny_repository import DATA


def test_lists_folders_and_shares(tmp_path):
    for name in ("a.jsonl", "folder/b.jsonl", "folder/deep/c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    sources = parse_sources(f"{tmp_path}/a.jsonl:0.5,{tmp_path}/folder")
    assert [(source.share, [file.name for file in source.files]) for source in sources] == [
        (0.5, ["a.jsonl"]),
        (1.0, ["b.jsonl", "c.jsonl"]),
    ]
    (tmp_path / "empty").mkdir()
    for spec, named in (
        (f"{tmp_path}/empty", "without any"),
        ("gone", "no such"),
        (f"{tmp_path}/a.jsonl:-1", "share"),
        (":2", "before the colon"),
        (" , ", "names no list"),
    ):
        with pytest.raises(ValueError, match=named):
            parse_sources(spec)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        "\xff",
        '{"path": 3, "duration": 1}',
        '{"path": "a.wav"}',
        '{"path": "a.wav", "duration": "1"}',
        '{"path": "a.wav", "duration": -1}',
        '{"path": "a.wav", "duration": NaN}',
        '{"path": "a.wav", "duration": 1' + 400 * "0" + "}",
        '{"path": "a.wav", "duration": 1e9}',
        '{"path": ".", "duration": 1}',
        r'{"path": "\ud800.wav", "duration": 1}',
        100_000 * "[",
    ],
)
def test_bad_lines_are_problems_with_their_number(tmp_path, line):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'\n{"path": "a.wav", "duration": 1.5}\n' + line.encode("latin-1") + b"\n")
    entries, problems = read_entries(path)
    assert [(entry.path, entry.duration, entry.line) for entry in entries] == [(tmp_path / "a.wav", 1.5, 2)]
    assert [problem.line for problem in problems] == [3]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{",
        '{"alignments": 1}',
        '{"alignments": [["a", [0, 1]]]}',
        '{"alignments": [["a", [0], "S"]]}',
        '{"alignments": [["a", [0, "1"], "S"]]}',
        '{"alignments": [], "text_conditions": "x"}',
    ],
)
def test_bad_transcripts_are_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"alignments|text_conditions|Expecting"):
        read_transcript(path)


def test_check_finds_every_kind_of_problem_with_its_line(tmp_path, capsys):
    kinds = ["ok", "gone", "mono", "long", "silent", "malformed", "unsorted", "line"]
    path = write_dataset(tmp_path, 8, **{f"train{i}": kind for i, kind in enumerate(kinds)})
    assert data_main(["check", str(path)]) == 1
    *problems, summary = capsys.readouterr().out.splitlines()
    named = ["no such file (audio)", "mono", "duration=0.64: the file has 0.320", "no such file (alignments)"]
    named += ["malformed", "unsorted", "not a valid line"]
    assert len(problems) == len(named)
    for number, (problem, part) in enumerate(zip(problems, named, strict=True), start=2):
        assert problem.startswith(f"{path}:{number}: ")
        assert part in problem
    assert summary == "8 lines, 0.001 hours of audio, 10 words, 5 of them by SPEAKER_MAIN; 7 problems, 0 notes."


def test_check_as_json_and_of_the_committed_data(tmp_path, capsys):
    assert data_main(["check", str(DATA), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], report["problems"], report["lines"]) == (True, [], 3)
    assert data_main(["check", str(write_dataset(tmp_path, 1, train0="mono")), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["line"], problem["file"]) == (1, str(tmp_path / "train.jsonl"))


def with_words(folder, *words, number: int = 1):
    """A list of `number` files; these are the alignments of the second, or only, one."""
    path = write_dataset(folder, number)
    (folder / f"train{number - 1}.json").write_text(json.dumps({"alignments": words}))
    return path


def test_check_names_malformed_and_unsorted_alignments_a_kind_in_a_line(tmp_path, capsys):
    words = [
        ["a", [0.05, 0.1], MAIN],
        ["b", [0.2], MAIN],
        ["c", [0.2, 0.25], MAIN],
        ["d", [0.1, 0.15], MAIN],
        ["e", [0.12, 0.15], USER],
        ["f", [0.11, 0.15], USER],
        "g",
        ["h", [-1, 0.2], USER],
        ["i", [9, 10], USER],
        ["j", [0.2, "0.3"], USER],
    ]
    path = with_words(tmp_path, *words, number=2)
    assert data_main(["check", str(path)]) == 1
    *problems, summary = capsys.readouterr().out.splitlines()
    named = [(1, "malformed", 3), (3, "unsorted", 3), (7, "starts before 0", 1), (8, "after the end", 1)]
    assert len(problems) == len(named)
    for problem, (index, what, count) in zip(problems, named, strict=True):
        assert problem.startswith(f"{path}:2: {tmp_path / 'train1.json'}: ")
        assert f"alignments[{index}]={words[index]!r}"[:15] in problem
        assert what in problem
        assert f"(and {count - 1} more of this kind in it)" in problem or count == 1
    assert "8 problems, 0 notes." in summary
    assert data_main(["check", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["problems"]
    named = [(1, "malformed"), (3, "unsorted"), (5, "unsorted"), (6, "malformed"), (7, "starts before 0")]
    named += [(7, "unsorted"), (8, "after the end"), (9, "malformed")]
    for index, what in named:  # all of them
        assert any(f"alignments[{index}]=" in one["message"] and what in one["message"] for one in found)
    assert len(found) == 8


def test_check_notes_words_without_a_duration_but_passes(tmp_path, capsys):
    path = with_words(tmp_path, ["a", [0.1, 0.1], MAIN], ["b", [0.2, 0.1], USER], ["c", [0.25, 0.3], MAIN])
    assert data_main(["check", str(path)]) == 0
    note, summary = capsys.readouterr().out.splitlines()
    assert note.startswith(f"{path}:1: note: {tmp_path / 'train0.json'}: alignments[0]=['a', (0.1, 0.1)")
    assert note.endswith("dropped in training, as it has no duration (and 1 more of this kind in it)")
    assert summary.endswith("1 words, 1 of them by SPEAKER_MAIN; 0 problems, 2 notes.")
    data_main(["check", str(path), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (report["ok"], [one["message"].count("alignments[0]") for one in report["notes"]]) == (True, [1, 0])


@pytest.mark.parametrize("words", [[["a", [0.1, 0.2], USER]], [["a", [0.1, 0.1], MAIN]]])
def test_check_names_a_file_in_which_moshi_says_nothing(tmp_path, capsys, words):
    assert data_main(["check", str(with_words(tmp_path, *words))]) == 1
    assert "no word by SPEAKER_MAIN" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_list_does_not_pass(tmp_path, capsys, content):
    (tmp_path / "a.jsonl").write_text(content)
    assert data_main(["check", str(tmp_path)]) == 1
    assert f"{tmp_path / 'a.jsonl'}:1: an empty list" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"RIFF\x00\x00\x00\x00WAVEfmt ", b"nonsense"])
def test_check_names_a_file_that_is_no_audio(tmp_path, capsys, content):
    path = write_dataset(tmp_path, 2)
    (tmp_path / "train1.wav").write_bytes(content)
    assert data_main(["check", str(path)]) == 1
    assert f"{path}:2: {tmp_path / 'train1.wav'}: cannot be read as audio" in capsys.readouterr().out


@pytest.mark.parametrize("kept", [44, 5000])
def test_check_names_a_file_of_which_a_part_is_missing(tmp_path, capsys, kept):
    path = write_dataset(tmp_path, 2)
    os.truncate(tmp_path / "train1.wav", kept)  # the header still promises all of it
    assert data_main(["check", str(path)]) == 1
    (line, _) = capsys.readouterr().out.splitlines()
    assert line == f"{path}:2: {tmp_path / 'train1.wav'}: ends before the 0.320 seconds of its header; copy it anew"


def test_check_names_a_file_whose_name_no_disk_can_hold(tmp_path, capsys):
    path = write_dataset(tmp_path, 2)
    path.write_text(path.read_text().replace("train1", 300 * "a"))
    assert data_main(["check", str(path)]) == 1
    assert f"{path}:2: {tmp_path / (300 * 'a')}.wav: no such file (audio)" in capsys.readouterr().out


@pytest.mark.parametrize(("spec", "named"), [("gone.jsonl", "gone.jsonl: no such"), (",", "names no list")])
def test_check_of_no_list(capsys, spec, named):
    assert data_main(["check", spec]) == 2
    assert named in capsys.readouterr().err


def test_many_problems_of_a_kind_are_a_few_lines_for_people_and_all_in_json(tmp_path, capsys):
    """As forty transcripts of longer recordings than those in the list."""
    path = write_dataset(tmp_path, 40)
    words = [["w", [i / 10, i / 10 + 0.05], MAIN] for i in range(100)]
    for index in range(40):
        (tmp_path / f"train{index}.json").write_text(json.dumps({"alignments": words}))
    assert data_main(["check", str(path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    late = [line for line in lines if "after the end" in line]
    assert len(late) == 4  # three transcripts, and one line for the others
    assert late[0].startswith(f"{path}:1: {tmp_path / 'train0.json'}: alignments[4]=")
    assert late[0].endswith("(and 95 more of this kind in it)")
    assert late[3].startswith(f"{path}: words after the end: {96 * 37} more in 37 more lines (4, 5, 6, ")
    assert f"{96 * 40 + 1} problems" in lines[-1]  # and that hardly a word becomes text
    assert len(lines) == 6
    assert data_main(["check", str(path), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 96 * 40 + 1


def test_check_shows_how_files_are_cut(tmp_path, capsys):
    path = write_dataset(tmp_path, 3, steps=40)
    write_dataset(tmp_path, 1, "other", steps=44)
    with path.open("a") as file:
        file.write((tmp_path / "other.jsonl").read_text())
    assert data_main(["check", str(path), "--duration", "1.6"]) == 0
    cut, _ = capsys.readouterr().out.splitlines()
    assert cut.startswith("9 segments of 1.6 s, of which 1 are remainders of 0.32 to 0.32 s, 0 of them shorter than a")
    assert data_main(["check", str(path), "--duration", "3.28", "--json"]) == 0  # 41 steps
    segments = json.loads(capsys.readouterr().out)["segments"]
    assert (segments["duration"], segments["whole"]) == (3.28, 1)
    assert segments["remainders"] == pytest.approx([3.2, 3.2, 3.2, 0.24])


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "ten"])
def test_check_refuses_a_duration_that_is_none(tmp_path, capsys, seconds):
    assert data_main(["check", str(DATA), f"--duration={seconds}"]) == 2
    assert "duration=" in capsys.readouterr().err


EXTREMES = {
    "far": [["boat", [1e308, 1.5e308], MAIN], ["boat", [0.1, 1.7e308], MAIN]],
    "far before": [["boat", [-1e308, 0.1], MAIN], ["name", [-1.7e308, 1.7e308], USER]],
    "tiny": [["boat", [5e-324, 1e-323], MAIN], ["name", [0.1, 0.1 + 1e-17], USER]],
    "long": [["boat " * 100_000, [0.1, 0.2], MAIN], ["x" * 100_000, [0.2], USER]],
    "many at once": [["boat", [0.1, 0.2], MAIN]] * 10_000,
    "whole numbers": [["boat", [10**300, 10**308], MAIN]],
    "odd letters": [["\x00\u202e\n\x1b[31m", [0.1, 0.2], MAIN], ["", [0.2, 0.3], MAIN]],
}


@pytest.mark.parametrize("kind", EXTREMES)
def test_extremes_are_checked_and_read_without_an_end_of_the_program(tmp_path, codec, capsys, kind):
    path = with_words(tmp_path, *EXTREMES[kind])
    code = data_main(["check", str(path), "--duration=0.32"])
    out = capsys.readouterr().out
    assert "problems, " in out.splitlines()[-1]
    assert code in (0, 1)
    assert max(map(len, out.splitlines())) < 1000
    try:
        make_tokenizer(codec, 0.32)(Segment(tmp_path / "train0.wav", 0))
    except BrokenItem:
        assert code == 1


@pytest.mark.parametrize("depth", [10, 300, 900, 980, 990, 995, 100_000])
def test_brackets_in_brackets_are_a_malformed_transcript(tmp_path, capsys, depth):
    path = write_dataset(tmp_path, 1)
    (tmp_path / "train0.json").write_text('{"alignments": [' + depth * "[" + depth * "]" + "]}")
    assert data_main(["check", str(path)]) == 1
    assert "train0.json: malformed alignment" in capsys.readouterr().out


@pytest.mark.parametrize("content", ['{"conditioners": 5}', '{"conditioners": {"mood": {"type": "lut"}}}', "[]", "{"])
def test_check_refuses_a_config_that_describes_no_model(tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert data_main(["check", str(DATA), f"--config={tmp_path / 'config.json'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "config" in line
