"""Shared by the tests of data: small datasets on disk, good and broken, and a tokenizer that tells what it read."""

import json
import wave
from pathlib import Path

import numpy as np
import torch

from finetune.data.tokenize import SpeechTokenizer
from finetune.settings.schema import TrainArgs

RATE, FRAME = 24_000, 1920
N_Q, DEP_Q = 8, 4
MAIN, USER = "SPEAKER_MAIN", "SPEAKER_USER"


class Recording(SpeechTokenizer):
    """The real one; remembers which segments it was asked for."""

    def __call__(self, segment):
        self.asked.append((segment.path.stem, segment.first_step))
        return super().__call__(segment)


def make_tokenizer(codec, duration_sec=4.0, **kwargs) -> Recording:
    tokenizer = Recording(*codec, n_q=N_Q, dep_q=DEP_Q, duration_sec=duration_sec, **kwargs)
    tokenizer.asked = []
    return tokenizer


def write_dataset(folder: Path, number: int, name: str = "train", steps: int = 4, **broken: str) -> Path:
    """A list of `number` files of noise and one word each. `broken` maps names of files to what is wrong with them."""
    folder.mkdir(exist_ok=True, parents=True)
    generator, lines = np.random.default_rng(0), []
    for index in range(number):
        stem = f"{name}{index}"
        kind = broken.get(stem)
        channels = 1 if kind == "mono" else 2
        pcm = (generator.standard_normal((steps * FRAME, 2))[:, :channels] * 3000).astype("<i2")
        with wave.open(str(folder / f"{stem}.wav"), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(pcm.tobytes())
        if kind == "gone":
            (folder / f"{stem}.wav").unlink()
        alignments = [["boat", [0.1, 0.2], MAIN], ["name", [0.2, 0.3], USER]]
        if kind == "unsorted":
            alignments.reverse()
        text = "{" if kind == "malformed" else json.dumps({"alignments": alignments})
        if kind != "silent":
            (folder / f"{stem}.json").write_text(text)
        duration = steps * FRAME / RATE * (2 if kind == "long" else 1)
        lines.append("nonsense" if kind == "line" else json.dumps({"path": f"{stem}.wav", "duration": duration}))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_args(train_data: str, batch_size: int = 2, shuffle: bool = True, eval_data: str = "") -> TrainArgs:
    args = TrainArgs(run_dir="run", seed=5, batch_size=batch_size)
    args.data.train_data, args.data.eval_data, args.data.shuffle = str(train_data), str(eval_data), shuffle
    return args


def take(loader, batches: int) -> torch.Tensor:
    """The next `batches` as `[batches, B, K, T]`."""
    return torch.stack([next(loader).codes for _ in range(batches)])
