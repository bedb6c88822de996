"""Makes as many spoken dialogues as wanted out of the words of `example/data`: WAV, word alignments and lists of files.

    python -m example.make_dialogues dialogues --train 192 --eval 24

In each, Moshi says some words, the user says others, and Moshi says the first ones again. The words are drawn by lot:
nobody can know what is said the first time, and only a memory knows it the second time. A word is the recording that
espeak-ng made for the example's dialogues, cut out by its alignment.
"""

import argparse
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import sphn

from example.make_speech import DATA, FRAME, MAIN, SAMPLE_RATE, USER, write_alignments, write_wav
from finetune.common.errors import ConfigError
from finetune.common.program import program

PAUSE = 3
"""Steps of 80 ms between two speakers."""

OFFSET = 240
"""Samples from the beginning of a step to that of its word: 10 ms, so that no rounding moves it to another step."""


@functools.cache
def recorded_words() -> dict[str, dict[str, np.ndarray]]:
    """The first recording of every word, `[samples]` float32 at 24 kHz, by speaker and word."""
    found: dict[str, dict[str, np.ndarray]] = {MAIN: {}, USER: {}}
    for path in sorted(DATA.glob("*.json")):
        audio = sphn.read(str(path.with_suffix(".wav")))[0]
        for word, (start, end), speaker in json.loads(path.read_text())["alignments"]:
            channel = audio[0 if speaker == MAIN else 1]
            found[speaker].setdefault(word, channel[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)])
    return found


def draw_turns(generator: np.random.Generator, words: int) -> list[tuple[str, list[str]]]:
    """Who says what: `words` words of Moshi's, one more of the user's, and Moshi's again."""
    known = recorded_words()
    mine = generator.choice(sorted(known[MAIN]), words, replace=False).tolist()
    theirs = generator.choice(sorted(known[USER]), words + 1, replace=False).tolist()
    return [(MAIN, mine), (USER, theirs), (MAIN, mine)]


def speak(turns: list[tuple[str, list[str]]]) -> tuple[np.ndarray, list]:
    """Says `turns`, each word at the same place within a step of 80 ms, so that Mimi gives it the same codes each time.

    Returns:
        `[2, samples]` float32, Moshi first, and the alignments `[word, [start_s, end_s], speaker]`.
    """
    placed, alignments, step = [], [], 2
    for speaker, words in turns:
        for word in words:
            pcm, start = recorded_words()[speaker][word], step * FRAME + OFFSET
            placed.append((0 if speaker == MAIN else 1, start, pcm))
            times = [round(at / SAMPLE_RATE, 4) for at in (start, start + len(pcm))]
            alignments.append([word, times, speaker])
            step += math.ceil((OFFSET + len(pcm)) / FRAME)
        step += PAUSE
    audio = np.zeros((2, step * FRAME), dtype=np.float32)
    for channel, start, pcm in placed:
        audio[channel, start : start + len(pcm)] = pcm
    return audio, alignments


def make_dialogues(folder: Path, counts: dict[str, int], words: int = 6, seed: int = 0) -> None:
    """Writes `NAME_0000.wav` and `.json` for each name of `counts`, and `NAME.jsonl`, into `folder`.

    Args:
        counts: dialogues by the name of their list, such as `{"train": 192, "eval": 24}`.
        words: that return in each.
        seed: of what is said; no dialogue of one list is in another.

    Raises:
        ConfigError: when the words that there are do not suffice.
    """
    most = min(len(known) for known in recorded_words().values()) - 1
    if not 2 <= words <= most:
        raise ConfigError(f"words={words}: must be from 2 to {most}, as many words as there are recordings of.")
    possible = math.perm(len(recorded_words()[MAIN]), words)
    for name, count in counts.items():
        if not 1 <= count <= possible // 10:
            raise ConfigError(f"{name}={count}: must be from 1 to {possible // 10} with {words} words.")
    if seed < 0:
        raise ConfigError(f"seed={seed}: must not be negative.")
    folder.mkdir(parents=True, exist_ok=True)
    generator, said = np.random.default_rng(seed), set()
    for name, count in counts.items():
        lines = []
        while len(lines) < count:
            turns = draw_turns(generator, words)
            if tuple(turns[0][1]) in said:
                continue
            said.add(tuple(turns[0][1]))
            audio, alignments = speak(turns)
            file = f"{name}_{len(lines):04d}.wav"
            write_wav(folder / file, audio)
            write_alignments(folder / file.replace(".wav", ".json"), alignments)
            lines.append(json.dumps({"path": file, "duration": audio.shape[1] / SAMPLE_RATE}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))


@program("python -m example.make_dialogues")
def main(argv: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=192, help="dialogues to train on (default: 192)")
    parser.add_argument("--eval", type=int, default=24, help="dialogues to hold out (default: 24)")
    parser.add_argument("--words", type=int, default=6, help="that return in each (default: 6)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    make_dialogues(args.folder, {"train": args.train, "eval": args.eval}, args.words, args.seed)
    print(f"{args.train} dialogues in {args.folder / 'train.jsonl'}, {args.eval} in {args.folder / 'eval.jsonl'}")


if __name__ == "__main__":
    sys.exit(main())
