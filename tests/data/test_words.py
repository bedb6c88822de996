"""Data: words that do not become text are counted; when hardly one does, `check` says so and training is refused."""

import json
from pathlib import Path

import pytest
import yaml

from finetune.data import sample as sample_module
from finetune.data.__main__ import main as data_main
from finetune.data.sample import MAX_TRANSCRIPTS, look_at_sample
from finetune.data.segments import Cutter, Listing
from finetune.data.word_count import WordCount
from finetune.training.__main__ import main as train
from tests.support.datasets import MAIN, USER, write_dataset
from tests.support.training_runs import settings_for

SECONDS, IDS = 100.0, (3, 0)
HINDI, EMOJI = "नमस्ते", "🚤"


def spoken(number: int, word: str = "boat", speaker: str = MAIN, scale: float = 1.0) -> list:
    """So many words, two a second."""
    return [(word, (scale * i / 2, scale * (i / 2 + 0.2)), speaker) for i in range(number)]


def counted(codec, *parts: list) -> WordCount:
    """Of one transcript with the words of all parts."""
    count = WordCount(codec[1], 12.5, IDS)
    count.add([word for part in parts for word in part], SECONDS)
    return count


def later(words: list, seconds: float) -> list:
    return [(text, (start + seconds, end + seconds), speaker) for text, (start, end), speaker in words]


def test_words_of_a_dialogue_are_placed(codec):
    count = counted(codec, spoken(50), later(spoken(50, speaker=USER), 50))
    assert (count.words, count.main, count.placed) == (100, 50, 50)
    assert count.unknown == count.outside == count.empty == count.crowded == 0
    assert count.refusal() is None
    assert count.warning() is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "no words in 1 transcripts"),
        (spoken(50, speaker="SPEAKER_00") + spoken(30, speaker="SPEAKER_01"), r"0 of 80 words are by SPEAKER_MAIN"),
        (spoken(50, scale=1000), "49 start outside of the audio; times must be in seconds, are these in milliseconds?"),
        (later(spoken(50), SECONDS), "50 start outside of the audio"),
        (spoken(50, HINDI), "50 are unknown to the tokenizer"),
        (spoken(50, EMOJI), "50 are unknown to the tokenizer"),
        (spoken(50, " "), "50 are unknown to the tokenizer"),
        (spoken(50, scale=0), "50 have no duration"),
        ([("boat", (1.0, 2.0), MAIN)] * 50, "49 start in the same step of 80 ms"),
    ],
    ids=["none", "labels", "milliseconds", "behind", "Hindi", "emoji", "blank", "no duration", "all at once"],
)
def test_transcripts_of_which_hardly_a_word_becomes_text_are_refused(codec, words, named):
    refusal = counted(codec, words).refusal()
    assert refusal is not None
    assert named in refusal


def test_a_refusal_names_the_speakers_and_the_unknown_words(codec):
    labels = counted(codec, spoken(50, speaker="SPEAKER_00"), spoken(3, speaker="B")).refusal()
    assert labels.endswith("Speakers found: SPEAKER_00 (50), B (3)")
    assert counted(codec, spoken(50, HINDI)).refusal().endswith(f"the first unknown: {', '.join([repr(HINDI)] * 3)}")


@pytest.mark.parametrize(("known", "verdict"), [(2, "refused"), (10, "warned"), (40, "warned"), (48, "good")])
@pytest.mark.parametrize("bad", [HINDI, "outside"])
def test_the_share_of_words_that_are_placed_decides(codec, known, verdict, bad):
    rest = later(spoken(50 - known, "boat" if bad == "outside" else bad), SECONDS if bad == "outside" else 50)
    count = counted(codec, spoken(known), rest)
    assert (count.refusal() is not None, count.warning() is not None) == (verdict == "refused", verdict == "warned")
    if verdict == "warned":
        assert f"of 50 words by SPEAKER_MAIN in 1 transcripts {known} are placed, {50 - known} " in count.warning()


@pytest.mark.parametrize(("main", "refused"), [(1, True), (6, False)])
def test_the_share_of_moshis_words_decides(codec, main, refused):
    count = counted(codec, spoken(main), later(spoken(400, speaker=USER, scale=0.1), 50))
    assert (count.refusal() is not None) is refused


def write(folder: Path, number: int, words: list) -> Path:
    path = write_dataset(folder, number, steps=20)
    for index in range(number):
        (folder / f"train{index}.json").write_text(json.dumps({"alignments": words}))
    return path


BAD = {
    "labels": [["boat", [0.1, 0.3], "SPEAKER_00"], ["name", [0.5, 0.7], "SPEAKER_01"]],
    "milliseconds": [["boat", [100, 300], MAIN], ["name", [500, 700], USER]],
    "Hindi": [[HINDI, [0.1, 0.3], MAIN], [EMOJI, [0.5, 0.7], MAIN]],
    "none": [],
}


@pytest.mark.parametrize("kind", BAD)
def test_training_is_refused_before_weights_are_read_and_check_says_the_same(tmp_path, ttt_repo, capsys, patched, kind):
    path = write(tmp_path / "data", 3, BAD[kind])
    settings = settings_for(ttt_repo, tmp_path / "run", data={"train_data": str(path)}, duration_sec=1.6)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | {"ttt": {"enabled": False}}))
    assert train([str(tmp_path / "run.yaml")]) != 0
    line = capsys.readouterr().err.splitlines()[-1]
    tokenizer = ttt_repo / "tokenizer.model"
    command = f"check {path} --duration 1.6 --tokenizer {tokenizer}"
    assert command in line
    assert not (tmp_path / "run").exists()
    assert data_main([*command.split(), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    (problem,) = [one for one in problems if one["kind"] == "words that do not become text"]
    assert f"{path}: {problem['message']}. " in line


def test_check_counts_words_by_list(tmp_path, ttt_repo, capsys):
    path = write(tmp_path, 3, [["boat", [0.1, 0.3], MAIN], ["boat", [0.5, 0.7], MAIN], ["name", [0.6, 0.7], USER]])
    assert data_main(["check", str(path), "--tokenizer", str(ttt_repo / "tokenizer.model")]) == 0
    words, _ = capsys.readouterr().out.splitlines()
    assert words == f"{path}: of 6 words by SPEAKER_MAIN in 3 transcripts 6 are placed."


@pytest.mark.parametrize(
    ("option", "named"), [("--tokenizer", "not a sentencepiece model"), ("--config", "not valid JSON")]
)
def test_check_with_a_file_that_cannot_be_used(tmp_path, capsys, option, named):
    (tmp_path / "file").write_text("nonsense")
    assert data_main(["check", str(write_dataset(tmp_path, 1)), option, str(tmp_path / "file")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert named in line


def test_check_refuses_the_tokenizer_of_another_model(tmp_path, ttt_repo, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"text_card": 40}))
    options = ["--tokenizer", str(ttt_repo / "tokenizer.model"), "--config", str(tmp_path / "config.json")]
    assert data_main(["check", str(write_dataset(tmp_path, 1)), *options]) == 2
    assert "has 61 pieces, and the model text_card=40" in capsys.readouterr().err


def test_a_source_is_judged_by_itself(tmp_path, codec):
    good, bad = write(tmp_path / "good", 20, [["boat", [0.1, 0.3], MAIN]]), write(tmp_path / "bad", 2, BAD["labels"])
    cutter = Cutter(1.6, 12.5)
    sampled = look_at_sample(Listing(f"{good},{bad}", cutter), cutter, codec[1], IDS)
    (refusal,) = sampled.refusals
    assert refusal.startswith(f"{bad}: 0 of 4 words")


def test_a_sample_reads_a_bounded_number_of_transcripts_of_the_whole_list(tmp_path, codec, monkeypatch):
    number, read = 3 * MAX_TRANSCRIPTS, []
    path = write_dataset(tmp_path, 1, steps=20)
    line = path.read_text()
    lines = []
    for index in range(number):
        for end in ("wav", "json"):
            (tmp_path / f"copy{index}.{end}").symlink_to(tmp_path / f"train0.{end}")
        lines.append(line.replace("train0", f"copy{index}"))
    path.write_text("".join(lines))
    scan = sample_module.scan_transcript
    monkeypatch.setattr(sample_module, "scan_transcript", lambda path: (read.append(path.stem), scan(path))[1])
    monkeypatch.setattr(sample_module, "MAX_SEGMENTS", 2)
    cutter = Cutter(1.6, 12.5)
    look_at_sample(Listing(str(path), cutter), cutter, codec[1], IDS)
    assert len(read) == MAX_TRANSCRIPTS + 2
    assert {"copy0", f"copy{number - 1}"} <= set(read)
