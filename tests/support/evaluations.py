"""Runs to evaluate, made by `train.py`, and command lines of `eval_from_checkpoint.py` for them."""

import json
import subprocess
import sys
from pathlib import Path

import moshi_patch
from finetune.settings.record import from_dict
from finetune.training.trainer import train
from tests.support.tiny_repository import DATA, ENVIRONMENT, ROOT, build_repo

NAMES = ("sister", "boat", "train")
MODES = {
    "merged": {"full_finetuning": True, "save_adapters": False},
    "adapters": {"lora": {"enable": True, "rank": 4, "scaling": 2.0}},
}


def training(repo: Path, run_dir: Path, **changes) -> dict:
    return {
        "data": {"train_data": f"{DATA}/train.jsonl"},
        "run_dir": str(run_dir),
        "moshi_paths": {"hf_repo_id": str(repo)},
        "duration_sec": 4,
        "batch_size": 2,
        "max_steps": 4,
        "param_dtype": "float32",
        "optim": {"lr": 3e-3, "pct_start": 0.3},
        "first_codebook_weight_multiplier": 5.0,
        "ttt": {"enabled": True, "layers": [1, 3], "chunk_size": 16, "learning_rate": 0.03},
        **changes,
    }


def make_runs(folder: Path) -> Path:
    """Runs of all modes, one with its control, one without TTT, the base model, and a list of three dialogues."""
    repo = build_repo(folder / "repo", ttt=False)
    for name, mode in MODES.items():
        train(from_dict(training(repo, folder / name, control=name == "adapters", **mode)))
    train(from_dict(training(repo, folder / "stock", **MODES["merged"], ttt={"enabled": False})))
    moshi_patch.uninstall()
    lines = [json.dumps({"path": f"{DATA}/{name}.wav", "duration": 11.0}) for name in NAMES]
    (folder / "eval.jsonl").write_text("\n".join(lines))
    return folder


def command_line(made: Path, out: Path, name: str, *options: str) -> list[str]:
    """That of an evaluation of the run `name` in `made`, with results in `out`."""
    fixed = [f"--data.eval_data={made / 'eval.jsonl'}", f"--out_dir={out}", "--segment_steps=40"]
    return [f"--checkpoint_dir={made / name / 'checkpoints' / 'checkpoint_000004'}", *fixed, *options]


def results(tmp_path, out="out") -> dict:
    return json.loads((tmp_path / out / "eval.json").read_text())


def start(words: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(ROOT / "eval_from_checkpoint.py"), *words]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
