"""Real speech by speakers that were never heard: the task `speech` with the recorded prompts of Asterisk.

`python -m benchmarks.evidence.prompts --data DIR [--seeds 1] [--out FILE] [--report-only]`

Fetches Debian's packages into DIR, where they are not there yet (needs `apt-get` and `dpkg`; 80 MB). Allison Smith in
English and June Wallack in French train; an Italian and a Russian voice are held out, and with them all that they say.
The codebooks of the tiny Mimi are fitted to the training part alone. The result is `benchmarks/results/prompts.json`;
`report.prompts` makes the tables of docs/evidence_speech.md.

Shapes: `R` rows of codes, `T` steps of 80 ms.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import sphn
import torch
from moshi.models import loaders

import moshi_patch
from benchmarks.measure import argument_parser, parse_arguments, write_result
from example.tiny_repo import fit_mimi, mimi_config

from .model import EVAL_SEED, evaluate, token_losses
from .report.prompts import DATA, report
from .settings import RESIDUAL, Settings
from .speech import CODES, PADDING, SOURCES, cut
from .training import trained

TRAINING = {"en": "en_US_f_Allison", "fr": "fr_CA_f_June"}
HELD_OUT = {"it": "it_IT_m_Carlo", "ru": "ru_RU_f_IvrvoiceRU"}
SOUNDS = Path("usr/share/asterisk/sounds")
SECONDS = 240
"""Of every speaker."""
PAUSE = 0.24
NEW = 160
"""Steps of speech in which nothing returns."""
PART = 32

SPEECH: dict[str, Any] = {"task": "speech", "recordings": "prompts", "card": CODES, "audio_rows": 2, "steps": 300}
MODELS: dict[str, dict[str, Any]] = {
    "no TTT": {"model": "none"},
    "the paper's": {},
    "residual": RESIDUAL,
}


def fetch(folder: Path) -> None:
    """Downloads and unpacks the packages that are not there yet.

    Raises:
        OSError: when apt-get or dpkg is missing or fails, saying which package it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for language, voice in (TRAINING | HELD_OUT).items():
        if (folder / SOUNDS / voice).is_dir():
            continue
        package = f"asterisk-core-sounds-{language}-wav"
        try:
            subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True)
            archive = next(folder.glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", str(archive), str(folder)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            raise OSError(f"{package}: could not be fetched into {folder}: {error}") from error


def track(folder: Path) -> torch.Tensor:
    """`[1, 1, samples]` at 24 kHz: prompts of one voice one after another with short pauses, `SECONDS` of them."""
    rate, parts, length = loaders.SAMPLE_RATE, [], 0
    silence = torch.zeros(round(PAUSE * rate))
    for path in sorted(folder.glob("*.wav")):
        pcm = torch.from_numpy(sphn.read(str(path), sample_rate=rate)[0])[0]
        parts += [pcm, silence]
        length += len(pcm) + len(silence)
        if length >= SECONDS * rate:
            break
    return torch.cat(parts)[None, None]


@torch.no_grad()
def encode(training: Sequence[torch.Tensor], held_out: Sequence[torch.Tensor]) -> dict[bool, tuple[torch.Tensor, ...]]:
    """Codes `[8, T]` of every track, by whether it is held out. The codebooks have seen the training tracks alone."""
    torch.manual_seed(0)
    mimi = fit_mimi(mimi_config(bins=CODES), training)
    parts = {False: training, True: held_out}
    return {part: tuple(mimi.encode(pcm)[0] for pcm in tracks) for part, tracks in parts.items()}


def use(folder: Path) -> None:
    """Makes the prompts in `folder` the recordings of the task; encoded once, and kept there."""
    file = folder / f"codes_{CODES}_{SECONDS}.pt"
    if not file.exists():
        tracks = [[track(folder / SOUNDS / voice) for voice in voices.values()] for voices in (TRAINING, HELD_OUT)]
        torch.save(encode(*tracks), file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    SOURCES["prompts"] = torch.load(file, weights_only=True).__getitem__


@torch.no_grad()
def new_speech(model: torch.nn.Module, settings: Settings, updates: bool) -> dict[str, float]:
    """Nats on held-out speech of one voice in which nothing returns: the first `PART` of `NEW` steps, and the last."""
    generator = torch.Generator().manual_seed(EVAL_SEED + 17)
    audio = torch.stack([cut(settings, NEW, True, generator) for _ in range(settings.eval_batch)])
    codes = torch.cat([torch.full_like(audio[:, :1], PADDING), audio], 1)
    with nullcontext() if updates else moshi_patch.ttt_updates(model):
        losses = token_losses(model, codes, True)[0].mean(0)
    return {"early": round(losses[: PART - 1].mean().item(), 4), "late": round(losses[-PART:].mean().item(), 4)}


def run(name: str, seed: int, cache: Path | None) -> list[dict[str, Any]]:
    """Trains one model and measures it, with TTT also with updates off."""
    settings = Settings(**SPEECH | MODELS[name], seed=seed)
    model, training = trained(settings, cache)
    found = []
    for updates in (True,) if settings.model == "none" else (True, False):
        final = evaluate(model.eval(), settings, updates)
        new = new_speech(model, settings, updates)
        shown = name if updates else f"{name}, updates off"
        found.append({"model": shown, "seed": seed, "id": settings.id, "final": final, "new": new})
    return [line | {"training_cpu_seconds": training["cpu_seconds"]} for line in found]


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__, device=False)
    parser.add_argument("--data", type=Path, help="folder for the recordings")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder for trained models")
    parser.add_argument("--report-only", action="store_true", help="tables from the committed results")
    parser.set_defaults(out=DATA, threads=1)
    args: argparse.Namespace = parse_arguments(parser, argv)
    if args.report_only:
        return report()
    if args.data is None or args.seeds < 1:
        parser.error(f"--data {args.data} --seeds {args.seeds}: a folder is needed, and at least one seed")
    try:
        fetch(args.data)
    except OSError as error:
        parser.error(str(error))
    moshi_patch.install()
    use(args.data)
    command = " ".join(["python -m benchmarks.evidence.prompts", *(sys.argv[1:] if argv is None else argv)])
    cache, args.cache, args.data = args.cache, None, None  # folders of this machine say nothing about the numbers
    lines: list[dict[str, Any]] = []
    for seed, name in ((seed, name) for seed in range(args.seeds) for name in MODELS):
        lines += run(name, seed, cache)
        write_result("prompts", args, command=command, lines=lines)


if __name__ == "__main__":
    main()
