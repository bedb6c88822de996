"""The demonstration behind `make demo`: a tiny Moshi learns to remember spoken words, beside a control without TTT.

    python -m example.demo [--out demo_out] [--seeds 0] [options of train.py]

Dialogues in which Moshi says words twice are put together from the words of `example/data`. `train.py` trains on them
with TTT and, as a control, without. Dialogues that were held out then show who remembers. What `train.py` prints is in
`OUT/train.log`.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # read when moshi is imported; compiling takes longer than running here
os.environ["OMP_NUM_THREADS"] = "1"  # so small a model computes faster than several threads agree on who does what

import torch
from moshi.models import LMModel

import moshi_patch
from example.make_dialogues import make_dialogues
from example.memory_at_work import CONDITIONS, draw, listen, read_spoken, summarise
from example.tiny_repo import make_tiny_repo
from finetune.checkpoint.saved import load_language_model, open_checkpoint
from finetune.common.errors import UserError
from finetune.common.files import write_json
from finetune.common.program import program
from finetune.common.tables import columns
from finetune.data.tokenize import load_speech_tokenizer
from finetune.training.control import compared
from finetune.training.metrics import read_metrics
from finetune.training.summary import verdict as trainer_verdict

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train.py"
SETTINGS = ROOT / "example" / "demo_ttt.yaml"
BASE = {"num_layers": 2, "n_q": 4, "dep_q": 2, "delays": [0, 0, 1, 0, 1]}
"""Of the tiny model: two layers, whose attention reaches 30 steps back, and two codebooks for each speaker."""

BASE_FILES = {
    "moshi_path": "model.safetensors",
    "mimi_path": "mimi.safetensors",
    "tokenizer_path": "tokenizer.model",
    "config_path": "config.json",
}


@contextmanager
def told(what: str) -> Iterator[None]:
    """Prints what is being done, and how many seconds it took."""
    print(what, end=" ... ", flush=True)
    start = time.monotonic()
    yield
    print(f"{time.monotonic() - start:.0f} s", flush=True)


def train(folder: Path, *options: str) -> None:
    """Runs `train.py` with the dialogues and the base in `folder`; what it prints goes to a file.

    Raises:
        UserError: when it fails, with the last line of that file.
    """
    base, data = folder / "base", folder / "dialogues"
    command = [sys.executable, str(TRAIN), str(SETTINGS), f"--run_dir={folder / 'run'}", "--overwrite_run_dir"]
    command += [f"--data.train_data={data / 'train.jsonl'}", f"--data.eval_data={data / 'eval.jsonl'}"]
    command += [f"--moshi_paths.{key}={base / file}" for key, file in BASE_FILES.items()] + list(options)
    log = folder / "train.log"
    with log.open("w") as file:
        print("$", *command, file=file, flush=True)
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        *_, last = log.read_text().splitlines()
        raise UserError(f"{last} (What train.py said before is in {log}.)")


def trained_model(run_dir: Path) -> LMModel:
    """The model of the newest checkpoint of a run."""
    return load_language_model(open_checkpoint(run_dir), None, torch.device("cpu"), torch.float32)


def run(folder: Path, seed: int, options: list[str], dialogues: dict[str, int]) -> dict[str, Any]:
    """One demonstration in `folder`, all of it with one seed; returns what `summarise` does."""
    data = folder / "dialogues"
    with told(
        f"Putting {dialogues['train']} spoken dialogues together to train on, and {dialogues['eval']} to hold out"
    ):
        make_dialogues(data, dialogues, seed=seed)
        base = make_tiny_repo(folder / "base", seed=seed, **BASE)
    longest = max(json.loads(line)["duration"] for name in dialogues for line in (data / f"{name}.jsonl").open())
    options = [f"--seed={seed}", f"--duration_sec={longest}", *options]
    with told("Training a tiny Moshi with TTT and, as the control, without"):
        train(folder, *options)
    with told("Listening to the held-out dialogues"):
        models = {"on": trained_model(folder / "run"), "control": trained_model(folder / "run" / "control")}
        info = moshi_patch.load_checkpoint_info(base)
        spoken = read_spoken(
            data / "eval.jsonl", load_speech_tokenizer(models["on"], info, longest, torch.device("cpu"))
        )
        heard = {"on": listen(models["on"], spoken), "off": listen(models["on"], spoken, updates=False)}
        heard["control"] = listen(models["control"], spoken)
    return {"seed": seed, "overall": overall(folder / "run"), **summarise(heard, spoken)}


def table(found: dict[str, Any]) -> str:
    """What each condition pays for words that are said for the first time and again."""
    rows = [[title, *(f"{found[when][name]:.2f}" for when in ("first", "again"))] for name, title in CONDITIONS.items()]
    return columns(["nats per word (lower is better)", "said first", "said again"], rows)


def verdict(found: dict[str, Any]) -> str:
    """One sentence: who predicts the words that return better, by how much, in how many of the dialogues."""
    difference = found["again"]["on"] - found["again"]["control"]
    better, all_of_them = found["better"], found["dialogues"]
    count = f"in {better} of {all_of_them} dialogues"
    if difference < 0 and better > 0.75 * all_of_them:
        return f"It remembers: with TTT a word that returns costs {-difference:.2f} nats less than without, {count}."
    return (
        f"It does not remember: with TTT less without, a word that returns costs {difference:+.2f} nats; less {count}."
    )


def overall(run_dir: Path) -> str:
    """The trainer's own verdict: on text and audio of the whole held-out dialogues, not on words that return alone."""
    train, held_out = (read_metrics(run_dir / f"metrics.{part}.jsonl") for part in ("train", "eval"))
    return trainer_verdict(train, held_out, compared(run_dir)).sentence


@program("python -m example.demo", logging.WARNING)
def main(argv: list[str], prog: str) -> None:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write to (default: demo_out)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data, weights and training (default: 0)")
    parser.add_argument("--train", type=int, default=192, help="dialogues to train on (default: 192)")
    parser.add_argument("--eval", type=int, default=24, help="dialogues to hold out (default: 24)")
    args, options = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    moshi_patch.install()
    out, runs = args.out.resolve(), []
    for seed in args.seeds:
        folder = out / f"seed_{seed}" if len(args.seeds) > 1 else out
        folder.mkdir(parents=True, exist_ok=True)
        runs.append(run(folder, seed, options, {"train": args.train, "eval": args.eval}))
        print(f"\n{table(runs[-1])}\n\n{verdict(runs[-1])}")
        print(f"All that is said, by train.py: {runs[-1]['overall']}", flush=True)
    write_json(out / "demo.json", {"runs": runs})
    draw(runs, out / "memory.png")
    print(f"Pictures: {out / 'memory.png'} (every word), {folder / 'run' / 'report.png'} (training).")
    print(f"What train.py said: {folder / 'train.log'}. On your own recordings: docs/training.md, and first")
    print("  python -m finetune.data check YOUR_LIST.jsonl")


if __name__ == "__main__":
    sys.exit(main())
