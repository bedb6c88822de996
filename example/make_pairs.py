"""Makes tiny stand-ins for the published benchmarks, in their layouts, out of melodies instead of speech.

    python example/make_pairs.py tiny_benchmarks

They show that the machinery runs, and their right answer is known. Which melodies are the words of this language is
drawn by lot: a model that has heard them finds them likelier than others, and one that has not cannot tell.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import sphn

NOTES = 7
"""Notes that there are."""

NOTE_SECONDS = 0.16
"""Two steps of Mimi."""

LOWEST, RATIO = 150.0, 1.6
"""Hertz of the first note, and that of each to the one before it."""

VOICES = {"A": (1.0, 0.5, 0.25), "B": (1.0, 0.1, 0.6)}
"""How loud the harmonics are: nobody's voice, but two different ones."""

RATES = {"lexical": 16_000, "syntactic": 16_000, "sSC": 22_050, "tSC": 22_050, "longform": 16_000}


def play(notes: np.ndarray, voice: str, rate: int) -> np.ndarray:
    """`[samples]` float32 at `rate`: each note for `NOTE_SECONDS`, its harmonics as loud as those of `voice`."""
    time = np.arange(round(NOTE_SECONDS * rate)) / rate
    fade = np.minimum(1, np.minimum(time, time[::-1]) / 0.005)
    pitch = LOWEST * RATIO ** np.asarray(notes)[:, None]
    harmonics = enumerate(VOICES[voice], start=1)
    waves = sum(loud * np.sin(2 * np.pi * order * pitch * time) for order, loud in harmonics)
    return (0.25 * fade * waves).astype(np.float32).ravel()


def two_melodies(generator: np.random.Generator, length: int, common: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two different ones, notes `[length]` each, drawn alike; they begin with the same `common` notes."""
    first = generator.integers(NOTES, size=length)
    second = first.copy()
    while (second == first).all():
        second[common:] = generator.integers(NOTES, size=length - common)
    return first, second


def make_zerospeech(folder: Path, generator: np.random.Generator, items: int, task: str, length: int) -> None:
    """`folder/TASK/dev` with `gold.csv` as in ZeroSpeech 2021: two voices say each item, file names say nothing."""
    folder = folder / task / "dev"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for item in range(items):
        both = two_melodies(generator, length)
        for voice in VOICES:
            for notes, correct in zip(both, (1, 0), strict=True):
                name = "".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), 11))
                sphn.write_wav(str(folder / f"{name}.wav"), play(notes, voice, RATES[task]), RATES[task])
                said = "".join("abcdefg"[note] for note in notes)
                row: dict[str, Any] = {"id": item, "filename": name, "voice": voice}
                if task == "lexical":
                    row |= {"frequency": item % 3 * 10, "word": said, "phones": " ".join(said), "length": length}
                else:
                    kind = "rise" if item % 2 else "return"
                    row |= {"type": kind, "subtype": f"{kind}_{item % 4}", "transcription": said}
                rows.append(row | {"correct": correct})
    with (folder / "gold.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_storycloze(folder: Path, generator: np.random.Generator, items: int, task: str, length: int) -> None:
    """`folder/TASK/NUMBER_STORY_correct.wav` and `..._incorrect.wav`: one beginning, and two ends of a fifth."""
    folder = folder / task
    folder.mkdir(parents=True, exist_ok=True)
    for item in range(items):
        both = two_melodies(generator, length, common=length - length // 5)
        for number, (notes, side) in enumerate(zip(both, ("correct", "incorrect"), strict=True), start=2 * item):
            path = folder / f"{number}_story-{item:04d}_{side}.wav"
            sphn.write_wav(str(path), play(notes, "A", RATES[task]), RATES[task])


def make_list(folder: Path, generator: np.random.Generator, items: int, length: int) -> None:
    """`folder/pairs.jsonl` and the files that it names."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    lines = []
    for item in range(items):
        paths = [f"audio/{item:04d}_{side}.wav" for side in ("good", "bad")]
        for path, notes in zip(paths, two_melodies(generator, length), strict=True):
            sphn.write_wav(str(folder / path), play(notes, "A", 24_000), 24_000)
        group = "even" if item % 2 == 0 else "odd"
        line = {"id": item, "correct": paths[0], "incorrect": paths[1], "group": group}
        lines.append(json.dumps(line) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))


def make_longform(folder: Path, generator: np.random.Generator, files: int, seconds: float) -> None:
    """`folder/SPEAKER/BOOK/FILE.wav` as in Libri-Light (whose files are FLAC); each shorter than the one before."""
    for index in range(files):
        place = folder / f"{100 + index}" / f"book_{index}"
        place.mkdir(parents=True, exist_ok=True)
        length = round(seconds / NOTE_SECONDS / (index + 1))
        notes = generator.integers(NOTES, size=length)
        rate = RATES["longform"]
        sphn.write_wav(str(place / f"chapter_{index:02d}.wav"), play(notes, "A", rate), rate)


def make_benchmarks(folder: str | Path, items: int = 12, seed: int = 0, longform_seconds: float = 40.0) -> Path:
    """Writes every set and returns the folder; the same seed gives the same files.

    Args:
        items: words, sentences, stories and pairs of the list; words and sentences in two voices each.
        longform_seconds: of the longest of three files.
    """
    folder, generator = Path(folder), np.random.default_rng(seed)
    make_zerospeech(folder / "sLM21-dataset", generator, items, "lexical", 6)
    make_zerospeech(folder / "sLM21-dataset", generator, items, "syntactic", 10)
    make_storycloze(folder, generator, items, "sSC", 20)
    make_storycloze(folder, generator, items, "tSC", 20)
    make_list(folder / "list", generator, items, 10)
    make_longform(folder / "longform", generator, 3, longform_seconds)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--items", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(make_benchmarks(args.folder, args.items, args.seed))


if __name__ == "__main__":
    main()
