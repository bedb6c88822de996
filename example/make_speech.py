"""Makes the spoken dialogues of `example/data` with espeak-ng: stereo WAV, word alignments and the lists of files.

Each word is synthesised alone and put down where the last one ended, so its alignment is exact. In every dialogue the
user says a fact at the start, the talk turns to something else, and Moshi says the fact again at the end.

    apt-get install espeak-ng && python example/make_speech.py
"""

import argparse
import json
import subprocess
import tempfile
import wave
from pathlib import Path

import numpy as np
import sphn

DATA = Path(__file__).parent / "data"
SAMPLE_RATE = 24_000
FRAME = 1920
"""Samples per step of 80 ms; files end at the end of a step."""

WORD_GAP, TURN_GAP = 0.04, 0.25
"""Seconds of silence between two words of a turn, and between two turns."""

PEAK = 0.6
SILENCE = 0.01
"""Of full scale: what lies below it at both ends of a word is cut off."""

MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"
VOICES = {MAIN: ["-v", "en-us+f3", "-s", "210", "-p", "55"], USER: ["-v", "en-gb", "-s", "200", "-p", "40"]}
"""Moshi, on the left channel, and the user, on the right one: options of espeak-ng."""

DIALOGUES = {
    "boat": [
        (USER, "my boat is called Nimbus"),
        (MAIN, "a lovely name"),
        (USER, "how is the weather today"),
        (MAIN, "sunny with some wind"),
        (USER, "what is my boat called"),
        (MAIN, "your boat is called Nimbus"),
    ],
    "train": [
        (USER, "my train leaves at seven"),
        (MAIN, "good to know"),
        (USER, "is there coffee on board"),
        (MAIN, "yes in the third coach"),
        (USER, "when does my train leave"),
        (MAIN, "your train leaves at seven"),
    ],
    "sister": [
        (USER, "my sister lives in Lisbon"),
        (MAIN, "that sounds nice"),
        (USER, "do you know a song"),
        (MAIN, "only some old ones"),
        (USER, "where does my sister live"),
        (MAIN, "your sister lives in Lisbon"),
    ],
}
LISTS = {"train": ["boat", "train"], "eval": ["sister"]}
"""Which dialogues each `.jsonl` file lists."""


def speak(word: str, speaker: str) -> np.ndarray:
    """One word in the voice of `speaker`: `[samples]` float32 at 24 kHz, without silence around it.

    Raises:
        FileNotFoundError: when espeak-ng is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "word.wav"
        subprocess.run(["espeak-ng", *VOICES[speaker], "-w", str(path), word], check=True)
        pcm = sphn.read(str(path), sample_rate=SAMPLE_RATE)[0][0]
    loud = np.flatnonzero(np.abs(pcm) > SILENCE)
    pcm = pcm[loud[0] : loud[-1] + 1]
    return pcm * (PEAK / np.abs(pcm).max())


def make_dialogue(turns: list[tuple[str, str]]) -> tuple[np.ndarray, list]:
    """Speaks `turns`, pairs of a speaker and a text.

    Returns:
        `[2, samples]` float32, Moshi first, and the alignments `[word, [start_s, end_s], speaker]`.
    """
    placed, alignments = [], []
    at = round(TURN_GAP * SAMPLE_RATE)
    for speaker, text in turns:
        for word in text.split():
            pcm = speak(word, speaker)
            placed.append((at, pcm, 0 if speaker == MAIN else 1))
            times = [round(at / SAMPLE_RATE, 4), round((at + len(pcm)) / SAMPLE_RATE, 4)]
            alignments.append([word, times, speaker])
            at += len(pcm) + round(WORD_GAP * SAMPLE_RATE)
        at += round((TURN_GAP - WORD_GAP) * SAMPLE_RATE)
    audio = np.zeros((2, -(-at // FRAME) * FRAME), dtype=np.float32)
    for start, pcm, channel in placed:
        audio[channel, start : start + len(pcm)] = pcm
    return audio, alignments


def write_wav(path: Path, audio: np.ndarray) -> None:
    """Writes `[channels, samples]` in [-1, 1] as 16 bit PCM at 24 kHz."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(audio.shape[0])
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(np.round(audio.T * 32767).astype("<i2").tobytes())


def write_alignments(path: Path, alignments: list) -> None:
    """Writes `{"alignments": [...]}`, one word per line."""
    lines = ",\n".join(json.dumps(alignment) for alignment in alignments)
    path.write_text(f'{{"alignments": [\n{lines}\n]}}\n')


def make_speech(folder: Path = DATA) -> None:
    """Writes `NAME.wav` and `NAME.json` of every dialogue and the `.jsonl` lists into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    durations = {}
    for name, turns in DIALOGUES.items():
        audio, alignments = make_dialogue(turns)
        write_wav(folder / f"{name}.wav", audio)
        write_alignments(folder / f"{name}.json", alignments)
        durations[name] = audio.shape[1] / SAMPLE_RATE
    for name, dialogues in LISTS.items():
        lines = [json.dumps({"path": f"{d}.wav", "duration": durations[d]}) + "\n" for d in dialogues]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write to (default: example/data)")
    make_speech(parser.parse_args().out)


if __name__ == "__main__":
    main()
