"""Settings of a short training run, and what it has logged."""

import json
from pathlib import Path

from tests.support.tiny_repository import DATA


def settings_for(repo: Path, run_dir: Path, **changes) -> dict:
    return {
        "data": {"train_data": f"{DATA}/train.jsonl", "eval_data": f"{DATA}/eval.jsonl", "shuffle": True},
        "run_dir": str(run_dir),
        "moshi_paths": {"hf_repo_id": str(repo)},
        "duration_sec": 5,
        "batch_size": 2,
        "max_steps": 6,
        "param_dtype": "float32",
        "optim": {"lr": 1e-3},
        "lora": {"enable": True, "rank": 4},
        "ttt": {"enabled": True, "layers": [1, 3], "chunk_size": 16, "learning_rate": 1e-2},
        **changes,
    }


def metrics(run_dir: Path | str, kind: str = "train") -> list[dict]:
    return [json.loads(line) for line in (Path(run_dir) / f"metrics.{kind}.jsonl").read_text().splitlines()]
