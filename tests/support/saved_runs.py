"""Runs of every mode, trained for two steps each and saved after both, to look at, export, evaluate or copy."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetune.checkpoint.checkpointer import Checkpointer
from finetune.checkpoint.folders import relocate_adapters
from finetune.checkpoint.training_state import TrainState
from finetune.model.trainable import parameter_groups
from finetune.settings.record import from_dict
from finetune.training.build_model import build_model
from finetune.training.optimizer import build_optimizer
from tests.support.checkpoint_runs import CTX, Place, advance
from tests.support.models import randomise_targets

MODES = {
    "adapter": {"lora": {"enable": True, "rank": 4}},
    "merged": {"lora": {"enable": True, "rank": 4}, "save_adapters": False},
    "full": {"full_finetuning": True},
    "ttt": {"training_mode": "ttt"},
}
TTT = {"enabled": True, "layers": [1, 3], "chunk_size": 8, "learning_rate": 0.03}


def train(run_dir: Path, base: Path, mode: str, built_as: Mapping[str, Any] = MappingProxyType({}), **settings) -> Path:
    """Trains the model of `base` in one of `MODES`, without data; the patch must be installed. Returns `run_dir`.

    Args:
        built_as: settings that the model is built with, other than those that are recorded.
        settings: of the training, beside the usual ones.
    """
    common = {"run_dir": str(run_dir), "moshi_paths": {"hf_repo_id": str(base)}, "ttt": TTT, "param_dtype": "float32"}
    args = from_dict({**common, "data": {"train_data": "/home/me/secret.jsonl"}, **MODES[mode], **settings})
    built = build_model(replace(args, **built_as), CTX)
    randomise_targets(built.model)
    optimizer = build_optimizer(parameter_groups(built.model, args), args.optim, args.max_steps)
    state = TrainState(0, built.model, *optimizer, Place())
    checkpointer = Checkpointer(run_dir, args, built.lm_config, CTX)
    for _ in range(2):
        advance(state)
        checkpointer.save(state)
    return run_dir


def copy_run(run: Path, to: Path) -> Path:
    """A copy of a run, to change, as if it had been trained there."""
    shutil.copytree(run, to)
    relocate_adapters(to)
    return to
