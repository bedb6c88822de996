"""Shared by the tests of checkpoints: tiny runs that save, resume and are served, without data or a trainer."""

import copy
import random
from pathlib import Path

import numpy as np
import torch
from moshi.models.loaders import CheckpointInfo

from finetune.checkpoint.checkpointer import Checkpointer
from finetune.checkpoint.training_state import TrainState
from finetune.common.distributed import Context
from finetune.model.adapters import add_adapters
from finetune.model.trainable import parameter_groups
from finetune.settings.parsing import build
from finetune.settings.schema import TrainArgs
from finetune.training.optimizer import build_optimizer
from tests.support.models import TINY, random_codes, randomise_targets, tiny_model

CTX = Context(0, 1, 0, torch.device("cpu"))
TTT = {"enabled": True, "layers": [1, 3], "chunk_size": 5, "learning_rate": 0.2}
LORA = {"enable": True, "rank": 3, "scaling": 2.0}
MODES = {
    "adapter": {"lora": LORA},
    "merged": {"lora": LORA, "save_adapters": False},
    "full": {"full_finetuning": True},
    "ttt_only": {},
}


class Place:
    """A loader that is nothing but its place."""

    def __init__(self):
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def arguments(run_dir, **settings) -> TrainArgs:
    content = {"run_dir": str(run_dir), "ttt": TTT, "param_dtype": "float32", "optim": {"lr": 1e-2}, "max_steps": 30}
    return build(TrainArgs, content | settings)


def lm_config(args: TrainArgs) -> dict:
    config = {**TINY, **args.ttt.to_kwargs(), "lora": args.lora.enable, "moshi_name": "base.safetensors"}
    return config | ({"lora_rank": args.lora.rank, "lora_scaling": args.lora.scaling} if args.lora.enable else {})


def tiny_run(args: TrainArgs, seed: int = 0) -> tuple[Checkpointer, TrainState]:
    """A run at step 0, of a model whose stock weights depend on nothing and whose new ones depend on `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    model = randomise_targets(tiny_model(getattr(torch, args.param_dtype), **args.ttt.to_kwargs()), seed=seed)
    if args.lora.enable:
        add_adapters(model, args.lora.rank, args.lora.scaling)
    return checkpointer_of(args), state_of(args, model)


def checkpointer_of(args: TrainArgs) -> Checkpointer:
    return Checkpointer(Path(args.run_dir), args, lm_config(args), CTX)


def state_of(args: TrainArgs, model: torch.nn.Module) -> TrainState:
    groups = parameter_groups(model, args)
    model.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    return TrainState(0, model, *build_optimizer(groups, args.optim, args.max_steps), Place())


def advance(state: TrainState, steps: int = 1) -> list[float]:
    """Trains, on other codes at every step, with dropout of codes that depends on all random numbers."""
    losses = []
    for _ in range(steps):
        codes = random_codes(state.model, 2, 24, seed=state.loader.place)
        noise = 1 + torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        out = state.model(codes)
        loss = noise * (out.text_logits.logsumexp(-1).mean() + out.logits.nan_to_num().logsumexp(-1).mean())
        loss.backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.scheduler.step()
        state.step, state.loader.place = state.step + 1, state.loader.place + 1
        losses.append(loss.item())
    return losses


def snapshot(state: TrainState) -> dict:
    content = (state.model.state_dict(), state.optimizer.state_dict(), state.scheduler.state_dict())
    return copy.deepcopy({"content": content, "place": state.loader.state_dict(), "step": state.step})


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def served(checkpoint: Path, base: Path | None, dtype=torch.float32, named: bool = False):
    """The model as `moshi.server --config-path` with `--lora-weight` or `--moshi-weight` loads it; nothing else.

    `named`: the adapters are those that the config names, as with `moshi.run_inference`.
    """
    folder = checkpoint / "consolidated"
    adapters, merged = folder / "lora.safetensors", folder / "consolidated.safetensors"
    nowhere = Path("not-read")
    info = CheckpointInfo.from_hf_repo(
        "no/repository",
        moshi_weights=merged if merged.is_file() else base,
        mimi_weights=nowhere,
        tokenizer=nowhere,
        config_path=folder / "config.json",
        lora_weights=adapters if adapters.is_file() and not named else None,
    )
    return info.get_moshi(dtype=dtype)
