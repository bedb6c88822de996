"""The memory at work: how well a model predicts words that return, what its fast weights do, and a figure of both.

python -m example.memory_at_work benchmarks/results/demo.json docs/memory_at_work.png    # the figure in the README
"""

import argparse
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from moshi.models import LMModel

import moshi_patch
from finetune.common.errors import ConfigError
from finetune.common.files import read_json
from finetune.common.program import program
from finetune.data.text_row import MAIN_SPEAKER
from finetune.data.tokenize import Segment, SpeechTokenizer
from finetune.model.stream import score_stream

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONDITIONS = {"control": "trained without TTT", "off": "with TTT, updates off", "on": "with TTT"}
"""Whose losses are compared, and their names for people."""

COLOURS = {"control": "#8c8c8c", "off": "#d9822b", "on": "#2f7ed8"}  # on white and on black
STEP_S = 0.08


@dataclass(frozen=True)
class Spoken:
    """Held-out dialogues as codes, and where Moshi's words are in them.

    Args:
        codes: `[B, K, T]`.
        words: for each dialogue, per word of Moshi's the first step and the number of tokens; the second half of a
            dialogue's words are those of the first half.
    """

    codes: torch.Tensor
    words: list[list[tuple[int, int]]]


def read_spoken(manifest: Path, tokenizer: SpeechTokenizer) -> Spoken:
    """The dialogues of a list that `example.make_dialogues` made."""
    codes, words = [], []
    for line in manifest.read_text().splitlines():
        path = manifest.parent / json.loads(line)["path"]
        codes.append(tokenizer(Segment(path, 0)).codes)
        spoken = json.loads(path.with_suffix(".json").read_text())["alignments"]
        mine = [
            (word, round(start / STEP_S - 0.125)) for word, (start, _), speaker in spoken if speaker == MAIN_SPEAKER
        ]
        words.append([(step, len(tokenizer.text_tokenizer.encode(word))) for word, step in mine])
    return Spoken(torch.cat(codes), words)


@torch.no_grad()
def listen(model: LMModel, spoken: Spoken, updates: bool = True) -> dict[str, Any]:
    """Streams all dialogues through `model` at once, a few steps at a time.

    Returns:
        `nats`: `[B, words]`, the loss of each of Moshi's words, the sum over its tokens; `delta`: after every segment
        the norm of the delta over that of W_down, mean over dialogues and layers (empty without TTT), and `seconds`,
        when that was.
    """
    delta: list[float] = []
    seconds: list[float] = []

    def look(steps: int) -> None:
        seconds.append((seconds[-1] if seconds else 0.0) + steps * STEP_S)
        if moshi_patch.ttt_memories(model):
            layers = moshi_patch.ttt_stats(model).values()
            delta.append(float(np.mean([layer["relative_delta"] for layer in layers])))

    with nullcontext() if updates else moshi_patch.ttt_updates(model):
        losses = score_stream(model, spoken.codes, segment_steps=4, progress=look).nats[:, 0]
    nats = [[row[at : at + n].sum().item() for at, n in words] for row, words in zip(losses, spoken.words, strict=True)]
    return {"nats": np.array(nats), "delta": delta, "seconds": seconds}


def summarise(heard: dict[str, dict[str, Any]], spoken: Spoken) -> dict[str, Any]:
    """What `listen` found under each of `CONDITIONS`, small enough for a file.

    Returns:
        `first` and `again`: nats per word by condition, said for the first time and again; `better`: in how many of the
        `dialogues` the words that return cost less with TTT than in the control; `words`: nats by condition, and
        `at`: seconds, of each word, means over dialogues; `delta` and `seconds` of the run with updates.
    """
    half = len(spoken.words[0]) // 2
    first, again = slice(half), slice(half, None)
    nats = {name: found["nats"] for name, found in heard.items()}
    differences = (nats["on"] - nats["control"])[:, again].mean(1)
    return {
        "first": {name: round(float(values[:, first].mean()), 3) for name, values in nats.items()},
        "again": {name: round(float(values[:, again].mean()), 3) for name, values in nats.items()},
        "better": int((differences < 0).sum()),
        "dialogues": len(differences),
        "words": {name: values.mean(0).round(3).tolist() for name, values in nats.items()},
        "at": (np.mean([[step for step, _ in row] for row in spoken.words], axis=0) * STEP_S).round(2).tolist(),
        "delta": np.round(heard["on"]["delta"], 3).tolist(),
        "seconds": np.round(heard["on"]["seconds"], 2).tolist(),
    }


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """The figure: nats of each word of a dialogue by condition, and below the norm of the delta; mean of `runs`."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.2, 4.6), height_ratios=(3, 1.2), sharex=True, layout="constrained"
    )
    at = np.mean([run["at"] for run in runs], axis=0)
    half = len(at) // 2
    for name, colour in COLOURS.items():
        nats = np.array([run["words"][name] for run in runs])
        for part in (slice(half), slice(half, None)):
            label = None if part.start else CONDITIONS[name]
            top.plot(at[part], nats.mean(0)[part], "-o", color=colour, linewidth=2, markersize=4.5, label=label)
            if len(runs) > 1:
                top.fill_between(at[part], nats.min(0)[part], nats.max(0)[part], color=colour, alpha=0.25, linewidth=0)
    top.set_ylim(0, 1.45 * max(max(run["words"][name]) for run in runs for name in COLOURS))
    said = ("Moshi says six words", "the user talks", "Moshi says them again")
    ends = (0.0, at[half - 1] + 0.45, at[half] - 0.25, at[-1] + 0.45)
    for text, begin, end in zip(said, ends[:-1], ends[1:], strict=True):
        top.text((begin + end) / 2, 0.98, text, transform=top.get_xaxis_transform(), ha="center", va="top", fontsize=9)
    for axis in (top, bottom):
        axis.axvspan(ends[1], ends[2], color="#808080", alpha=0.15, linewidth=0)
        axis.spines[["top", "right"]].set_visible(False)
    top.set_ylabel("nats per word\n(lower is better)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    length = min(len(run["delta"]) for run in runs)
    delta = np.mean([run["delta"][:length] for run in runs], axis=0)
    seconds = runs[0]["seconds"][:length]
    bottom.step([0, *seconds], [0, *delta], where="post", color=COLOURS["on"], linewidth=2)
    bottom.set_ylabel("fast weight:\n|ΔW| / |W|")
    bottom.set_xlabel("seconds into the dialogue")
    bottom.set_xlim(0, ends[-1])
    bottom.set_ylim(bottom=0)
    figure.savefig(path, dpi=100, pil_kwargs={"optimize": True})
    plt.close(figure)


@program("python -m example.memory_at_work")
def main(argv: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what the demo wrote, such as benchmarks/results/demo.json")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args(argv)
    found = read_json(args.results)
    if "runs" not in found:
        raise ConfigError(f"{args.results}: not what the demo wrote; it has no runs.")
    draw(found["runs"], args.picture)
    print(args.picture)


if __name__ == "__main__":
    sys.exit(main())
