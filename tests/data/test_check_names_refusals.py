"""Data: whatever training or an evaluation refuses, `check` names, and what it passes nobody refuses."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sphn

from finetune.data.__main__ import main as data_main
from finetune.data.broken import BrokenData, BrokenItem
from finetune.data.conditions import conditions_of
from finetune.data.segments import Listing
from tests.support.audio_files import RATE, UNKNOWN, noise, write_adpcm, write_endless_flac, write_wav
from tests.support.datasets import MAIN, make_tokenizer, write_dataset

SECONDS = 0.8
CONFIG = {
    "conditioners": {"mood": {"type": "lut", "lut": {"n_bins": 2, "dim": 4, "tokenizer": "noop"}}},
}
CONFIG["conditioners"]["mood"]["lut"]["possible_values"] = ["good", "bad"]


def with_sample(value: float) -> np.ndarray:
    pcm = noise(20)
    pcm[1, -7] = value
    return pcm


def listed(folder: Path, line: str | dict) -> None:
    (folder / "train.jsonl").write_text((json.dumps(line) if isinstance(line, dict) else line) + "\n")


def transcript(folder: Path, content) -> None:
    (folder / "train0.json").write_text(content if isinstance(content, str) else json.dumps(content))


def of_duration(folder: Path, seconds: float) -> None:
    listed(folder, {"path": "train0.wav", "duration": seconds})


def sound(pcm: np.ndarray, **header) -> Callable[[Path], None]:
    return lambda folder: write_wav(folder / "train0.wav", pcm, **header)


def one_sample(folder: Path) -> None:
    sphn.write_wav(str(folder / "train0.wav"), np.zeros((2, 1), "f"), RATE)
    of_duration(folder, 1 / RATE)


def piped(folder: Path) -> None:
    """As long as its header says, to someone who asks a decoder for it."""
    write_wav(folder / "train0.wav", noise(20), data=UNKNOWN, riff=UNKNOWN)
    of_duration(folder, 44739.2)


def endless_flac(folder: Path) -> None:
    write_endless_flac(folder / "train0.flac")
    listed(folder, {"path": "train0.flac", "duration": 1.6})


def a_step_too_long(folder: Path) -> None:
    """Within the tolerance of a duration, but a segment begins where the audio ends."""
    of_duration(folder, 1.65)


BREAK: dict[str, Callable[[Path], object]] = {
    "no JSON": lambda folder: listed(folder, "nonsense"),
    "no path": lambda folder: listed(folder, {"duration": 1.6}),
    "no duration": lambda folder: listed(folder, {"path": "train0.wav"}),
    "empty list": lambda folder: listed(folder, ""),
    "no audio file": lambda folder: (folder / "train0.wav").unlink(),
    "no alignments": lambda folder: (folder / "train0.json").unlink(),
    "not audio": lambda folder: (folder / "train0.wav").write_bytes(b"nonsense"),
    "empty file": lambda folder: (folder / "train0.wav").write_bytes(b""),
    "a folder": lambda folder: ((folder / "train0.wav").unlink(), (folder / "train0.wav").mkdir()),
    "mono": sound(noise(20, channels=1)),
    "three channels": sound(noise(20, channels=3)),
    "impossible rate": sound(noise(20), rate=4_000_000_000 // 8),
    "header alone": lambda folder: os.truncate(folder / "train0.wav", 44),
    "cut off": lambda folder: os.truncate(folder / "train0.wav", 50_000),
    "NaN": sound(with_sample(np.nan)),
    "infinite": sound(with_sample(-np.inf)),
    "huge": sound(with_sample(1e12)),
    "one sample": one_sample,
    "no samples": sound(noise(0)),
    "adpcm": lambda folder: write_adpcm(folder / "train0.wav", 1.6),
    "header of 0": sound(noise(20), data=0),
    "header of 0 twice": sound(noise(20), data=0, riff=0),
    "header of UNKNOWN": sound(noise(20), data=UNKNOWN),
    "piped": piped,
    "endless flac": endless_flac,
    "too long": lambda folder: of_duration(folder, 3.2),
    "a step too long": a_step_too_long,
    "transcript no JSON": lambda folder: transcript(folder, "{"),
    "transcript no object": lambda folder: transcript(folder, []),
    "deep transcript": lambda folder: transcript(folder, 100_000 * "["),
    "malformed alignment": lambda folder: transcript(folder, {"alignments": [["boat", [0.1], MAIN]]}),
    "conditions no object": lambda folder: transcript(folder, {"alignments": [], "text_conditions": "good"}),
    "unknown condition": lambda folder: transcript(
        folder, {"alignments": [["boat", [0.1, 0.2], MAIN]], "text_conditions": {"mood": "angry"}}
    ),
}


@pytest.fixture
def dataset(tmp_path):
    write_dataset(tmp_path, 1, steps=20)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def refusal(folder: Path, codec) -> str | None:
    """What training says of the dataset, reading every segment; None when it takes all of it."""
    names, prepare = conditions_of(CONFIG)
    tokenizer = make_tokenizer(codec, SECONDS, conditions=names, prepare=prepare)
    try:
        for segment in Listing(str(folder / "train.jsonl"), tokenizer).segments[0]:
            tokenizer(segment)
    except (BrokenData, BrokenItem) as error:
        return str(error)
    return None


def named(folder: Path, capsys) -> tuple[int, list[dict]]:
    options = [f"--duration={SECONDS}", f"--config={folder / 'config.json'}", "--json"]
    code = data_main(["check", str(folder / "train.jsonl"), *options])
    return code, json.loads(capsys.readouterr().out)["problems"]


@pytest.mark.parametrize("breakage", BREAK)
def test_what_training_refuses_is_named(dataset, codec, capsys, breakage):
    BREAK[breakage](dataset)
    assert refusal(dataset, codec) is not None
    code, problems = named(dataset, capsys)
    assert code == 1
    assert problems


def test_a_good_dataset_is_taken_and_passes(dataset, codec, capsys):
    assert refusal(dataset, codec) is None
    assert named(dataset, capsys) == (0, [])


def test_a_wav_from_a_pipe_with_the_seconds_that_it_plays_is_taken_and_noted(dataset, codec, capsys):
    write_wav(dataset / "train0.wav", noise(20), data=UNKNOWN, riff=UNKNOWN)
    assert refusal(dataset, codec) is None
    assert data_main(["check", str(dataset / "train.jsonl")]) == 0
    note, summary = capsys.readouterr().out.splitlines()
    assert f"note: {dataset / 'train0.wav'}: its WAV header says 4294967295 bytes of audio" in note
    assert note.endswith("it plays 1.600 seconds")
    assert "0 problems, 1 notes" in summary


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("NaN", "samples that are not finite, the first after 1.600 s"),
        ("one sample", "no audio, 1 samples"),
        ("adpcm", "this codec cannot be read from the middle; convert it, for example with `ffmpeg -i train0.wav"),
        ("header of UNKNOWN", "its WAV header says 4294967295 bytes of audio, and 307200 follow"),
        ("endless flac", "its FLAC header does not say how long it is"),
        ("piped", "duration=44739.2: the file has 1.600 seconds"),
        ("a step too long", "no audio in 1 of 3 segments, those from step 20 on"),
        ("unknown condition", "text_conditions={'mood': 'angry'}"),
    ],
)
def test_problems_say_what_is_wrong(dataset, capsys, breakage, message):
    BREAK[breakage](dataset)
    assert any(message in problem["message"] for problem in named(dataset, capsys)[1])
