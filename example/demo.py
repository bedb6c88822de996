"""The demonstration behind `make demo`: recall beyond attention, real speech through a tiny Moshi, and training one."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("NO_TORCH_COMPILE", "1")  # read when moshi is imported; compiling takes longer than running here

import numpy as np
import sphn
import torch
from moshi.models import LMGen, LMModel, MimiModel, loaders
from tqdm import tqdm

import moshi_patch
from example.tiny_repo import DATA, make_tiny_repo
from moshi_patch.repository import local_repositories

ROOT = Path(__file__).parent.parent


@dataclass
class Trace:
    """What one run over a stream left behind.

    Attributes:
        logits: of the text, `[text_card]` float32 per step.
        text, audio: what the model said, `[B]` and `[B, dep_q]` per step.
        stats: of the fast weights at the end, as `moshi_patch.ttt_stats` gives them.
    """

    logits: list[torch.Tensor] = field(default_factory=list)
    text: list[torch.Tensor] = field(default_factory=list)
    audio: list[torch.Tensor] = field(default_factory=list)
    stats: dict[str, dict] = field(default_factory=dict)


def user_speech(path: Path) -> Path:
    """Writes what the user says in all dialogues of the example, one after the other, as a mono file."""
    channels = [sphn.read(str(file))[0][1] for file in sorted(DATA.glob("*.wav"))]
    sphn.write_wav(str(path), np.concatenate(channels), loaders.SAMPLE_RATE)
    return path


@torch.no_grad()
def encode(mimi: MimiModel, path: Path) -> torch.Tensor:
    """The codes `[1, K, T]` of a speech file, encoded frame by frame as they would arrive."""
    pcm = torch.from_numpy(sphn.read(str(path), sample_rate=mimi.sample_rate)[0])[None, :1]
    frames = [frame for frame in pcm.split(mimi.frame_size, dim=2) if frame.shape[2] == mimi.frame_size]
    with mimi.streaming(1):
        return torch.cat([mimi.encode(frame) for frame in tqdm(frames, desc="Mimi encodes", unit="step")], 2)


@torch.no_grad()
def stream(lm: LMModel, codes: torch.Tensor, title: str, said: Trace | None = None) -> Trace:
    """Lets `lm` listen to `codes [1, K, T]` step by step.

    With `said`, the model says what it said in that run: the two hear and say the same, and differ in what they learnt.
    """
    trace = Trace()

    def on_text(token: torch.Tensor) -> None:
        if said is not None:
            token.copy_(said.text[len(trace.text)])
        trace.text.append(token.clone())

    def on_audio(tokens: torch.Tensor) -> None:
        if said is not None:
            tokens.copy_(said.audio[len(trace.audio)])
        trace.audio.append(tokens.clone())

    lm_gen = LMGen(
        lm,
        use_sampling=False,
        on_text_hook=on_text,
        on_audio_hook=on_audio,
        on_text_logits_hook=lambda logits: trace.logits.append(logits[0, 0, 0].float().clone()),
    )
    with lm_gen.streaming(1):
        for step in tqdm(codes.split(1, dim=2), desc=title, unit="step"):
            lm_gen.step(step)
        trace.stats = moshi_patch.ttt_stats(lm)
    return trace


def divergence(trace: Trace, control: Trace) -> torch.Tensor:
    """`[T]`: KL divergence, in nats, of the control's text distribution from the run's at each step."""
    log_p = torch.stack(trace.logits).log_softmax(-1)
    log_q = torch.stack(control.logits).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def report(on: Trace, off: Trace, chunk_size: int) -> str:
    """How often and how much the fast weights moved, per layer, beside the control without updates."""
    rows = [f"{'layer':32}{'updates':>10}{'|delta|':>12}{'relative':>12}{'updates off':>14}{'|delta| off':>14}"]
    for name, stats in on.stats.items():
        control = off.stats[name]
        rows.append(
            f"{name:32}{stats['updates'][0]:>10}{stats['delta_norm'][0]:>12.4f}{stats['relative_delta'][0]:>12.4f}"
            f"{control['updates'][0]:>14}{control['delta_norm'][0]:>14.4f}"
        )
    kl = divergence(on, off)
    changed = (torch.stack(on.logits).argmax(-1) != torch.stack(off.logits).argmax(-1)).float()
    rows += [
        "",
        f"{len(kl)} steps of 80 ms, chunks of {chunk_size} steps. Text distribution, updates on against updates off,",
        "both hearing and saying the same:",
        f"  first chunk, before any update:  largest KL {kl[:chunk_size].abs().max():g} nats (0: the very same)",
        f"  after it:                        mean KL {kl[chunk_size:].mean():.3f} nats, "
        f"another most likely token in {100 * changed[chunk_size:].mean():.0f} % of the steps",
        "The weights are random, not trained: this shows that the mechanism runs, and nothing about quality.",
    ]
    return "\n".join(rows)


def stream_speech(out: Path) -> None:
    """Makes the tiny repository, runs moshi's own inference on the speech, then looks at the fast weights."""
    print("\n== Real speech through a tiny local Moshi, TTT on ==", flush=True)
    repo = make_tiny_repo(out / "repo", ttt=True)
    speech = user_speech(out / "in.wav")
    command = [sys.executable, "-m", "moshi_patch", "moshi.run_inference", "--device", "cpu", "--hf-repo", str(repo)]
    command += ["--batch-size", "1", str(speech), str(out / "out.wav")]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)

    moshi_patch.install()
    with local_repositories():
        info = loaders.CheckpointInfo.from_hf_repo(str(repo))
    codes = encode(info.get_mimi(device="cpu"), speech)
    lm = info.get_moshi(device="cpu")
    on = stream(lm, codes, "updates on")
    with moshi_patch.ttt_updates(lm, enabled=False):
        off = stream(lm, codes, "updates off", said=on)
    print("\n" + report(on, off, lm.ttt_config.chunk_size))


def train_and_stream(out: Path) -> None:
    """Trains `example/tiny_ttt.yaml` with and without TTT from the same weights, then streams a held-out dialogue."""
    print("\n== Training on the example's dialogues, from one YAML file ==", flush=True)
    repo = make_tiny_repo(out / "base")  # a stock model: TTT starts as an exact no-op
    files = {"moshi_path": "model", "mimi_path": "mimi", "tokenizer_path": "tokenizer", "config_path": "config"}
    endings = {"config_path": "json", "tokenizer_path": "model"}
    paths = [f"--moshi_paths.{key}={repo / name}.{endings.get(key, 'safetensors')}" for key, name in files.items()]
    for name, switch in (("with_ttt", "true"), ("without_ttt", "false")):
        command = [sys.executable, "train.py", "example/tiny_ttt.yaml", *paths, f"--run_dir={out / name}"]
        command += ["--overwrite_run_dir=true", f"--ttt.enabled={switch}"]
        print("$", " ".join(command), flush=True)
        subprocess.run(command, cwd=ROOT, check=True)
    print("\n" + losses(out / "with_ttt", out / "without_ttt"))
    print("Two short dialogues to train on: this shows that training runs and what the control says, not a benefit.")
    print(f"curves and relative delta per layer: {out / 'with_ttt' / 'report.png'}\n", flush=True)

    checkpoint = sorted((out / "with_ttt" / "checkpoints").glob("checkpoint_*"))[-1] / "consolidated"
    command = [sys.executable, "-m", "moshi_patch", "moshi.run_inference", "--device", "cpu", "--batch-size", "1"]
    command += ["--hf-repo", str(repo), "--moshi-weight", str(checkpoint / "consolidated.safetensors")]
    command += ["--config", str(checkpoint / "config.json"), str(DATA / "sister.wav"), str(out / "trained.wav")]
    print("$", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def losses(with_ttt: Path, without_ttt: Path) -> str:
    """First and last loss of two runs, and of the first with updates off, in nats."""
    rows = [f"{'nats (text + audio)':44}{'first':>8}{'last':>8}"]
    for title, run, key in (
        ("training, no TTT", without_ttt, "train:loss"),
        ("training, TTT", with_ttt, "train:loss"),
        ("held-out dialogue, no TTT", without_ttt, "eval:loss"),
        ("held-out dialogue, TTT", with_ttt, "eval:loss"),
        ("held-out dialogue, same weights, updates off", with_ttt, "eval:loss_updates_off"),
    ):
        part, name = key.split(":")
        values = [json.loads(line)[name] for line in (run / f"metrics.{part}.jsonl").read_text().splitlines()]
        rows.append(f"{title:44}{values[0]:8.3f}{values[-1]:8.3f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder to write to (default: demo_out)")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print("== Recall beyond the attention's reach: the easy case ==", flush=True)
    recall = [sys.executable, "-m", "benchmarks.evidence.recall", "--case", "easy", "--out", str(out)]
    subprocess.run(recall, cwd=ROOT, check=True)
    # So small a model computes faster than several threads agree on who does what.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    stream_speech(out)
    train_and_stream(out)


if __name__ == "__main__":
    main()
