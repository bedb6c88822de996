"""Settings of a short training run, and what it has logged."""

import json
import logging
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from finetune.training.__main__ import main
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


@dataclass
class Ended:
    """How a program ended, and what it logged and wrote to stderr."""

    returncode: int
    stderr: str


class Program:
    """`train.py WORDS` in this process: the exit code and the lines are those of the command."""

    def __init__(self, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture):
        self._capsys, self._caplog = capsys, caplog

    def __call__(self, *words: object) -> Ended:
        self._caplog.clear()
        self._capsys.readouterr()
        hook = threading.excepthook
        try:
            with self._caplog.at_level(logging.INFO):
                code = main([*map(str, words)], prog="train.py")
        finally:
            threading.excepthook = hook
        ours = [record for record in self._caplog.records if record.name.startswith(("finetune", "moshi_patch"))]
        lines = [f"{record.levelname} {record.name}: {record.getMessage()}\n" for record in ours]
        return Ended(code, "".join(lines) + self._capsys.readouterr().err)
