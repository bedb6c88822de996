"""Checkpoints of two gloo processes on the CPU, sharded by FSDP, are those of one, and are read back on one or on two.

Run as `python -m tests.checkpoint.test_distributed RANK WORLD RESULT JOB...`, it is one process. A job `MODE:FOLDER`
trains in FOLDER to step 2, saves, to step 4, and saves; `MODE:FOLDER:resume` continues from step 2 and saves at 4.
"""

import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import moshi_patch
from finetune.checkpoint.checkpointer import Checkpointer
from finetune.checkpoint.training_state import TrainState
from finetune.common.distributed import Context, cleanup
from finetune.model.adapters import add_adapters
from finetune.model.trainable import parameter_groups
from finetune.training.optimizer import build_optimizer
from finetune.training.sharding import shard
from tests.support.checkpoint_runs import CTX, MODES, Place, arguments, lm_config, served
from tests.support.loading import assert_active, logits
from tests.support.models import random_codes, randomise_targets, relative, tiny_model
from tests.support.processes import run_processes

pytestmark = pytest.mark.slow

ROWS, STEPS = 4, 24
LAST = "checkpoint_000004"


def prepare(folder: Path, ctx: Context, mode: str) -> tuple[Checkpointer, TrainState]:
    """A run at step 0; on two processes the model is sharded, and only rank 0 begins with the weights."""
    args = arguments(folder, param_dtype="float64", **MODES[mode])
    model = tiny_model(torch.float64, **args.ttt.to_kwargs(), positional_embedding="none", seed=ctx.rank)
    randomise_targets(model, seed=ctx.rank)
    if args.lora.enable:
        add_adapters(model, args.lora.rank, args.lora.scaling)
    groups = parameter_groups(model, args)
    model.requires_grad_(False)
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    config = lm_config(args) | {"positional_embedding": "none"}
    if ctx.world_size > 1:
        model = shard(model, ctx, parts=not args.full_finetuning)
    parts = build_optimizer(parameter_groups(model, args), args.optim, args.max_steps)
    return Checkpointer(folder, args, config, ctx), TrainState(0, model, *parts, Place())


def advance(state: TrainState, ctx: Context) -> float:
    """One step on this process' share of the rows; the loss of all."""
    codes = random_codes(state.model, ROWS, STEPS, seed=state.loader.place)
    share = ROWS // ctx.world_size
    out = state.model(codes[ctx.rank * share : (ctx.rank + 1) * share])
    loss = out.text_logits.logsumexp(-1).mean() + out.logits.nan_to_num().logsumexp(-1).mean()
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.scheduler.step()
    state.step, state.loader.place = state.step + 1, state.loader.place + 1
    mean = loss.detach().clone()
    if ctx.world_size > 1:
        dist.all_reduce(mean)
    return mean.item() / ctx.world_size


def work(ctx: Context, mode: str, folder: str, resume: str = "") -> dict:
    checkpointer, state = prepare(Path(folder), ctx, mode)
    torch.manual_seed(77 if resume else 100 + ctx.rank)
    if resume:
        checkpointer.load(checkpointer.find(2), state)
    losses = {}
    while state.step < 4:
        losses[str(state.step)] = advance(state, ctx)
        if state.step in (2, 4):
            checkpointer.save(state)
    return {"losses": losses, "random": torch.rand(3).tolist()}


def run(folder: Path, world: int, *jobs: str) -> list[list[dict]]:
    """For each job the results of `world` processes."""
    place = folder / f"{time.monotonic_ns()}"
    place.mkdir()
    results = [place / f"{rank}.json" for rank in range(world)]
    words = [[rank, world, results[rank], *jobs] for rank in range(world)]
    run_processes("tests.checkpoint.test_distributed", words, place, seconds=150)
    return list(zip(*(json.loads(path.read_text()) for path in results), strict=True))


@pytest.mark.parametrize("mode", ["adapter", "full"])
def test_two_processes_save_what_one_saves_and_either_continues_on_the_other(tmp_path, mode):
    one, two = tmp_path / "one", tmp_path / "two"
    [[alone]] = run(tmp_path, 1, f"{mode}:{one}")
    both, again, from_one = run(tmp_path, 2, f"{mode}:{two}", f"{mode}:{two}:resume", f"{mode}:{one}:resume")
    [[from_two]] = run(tmp_path, 1, f"{mode}:{two}:resume")

    file = "lora.safetensors" if mode == "adapter" else "consolidated.safetensors"
    # each course that was left for another stands aside, numbered
    names = [f"abandoned-{LAST}", LAST], [f"abandoned-{LAST}", f"abandoned-{LAST}-2", LAST]
    saved = [
        folder / "checkpoints" / n / "consolidated" for folder, k in zip((one, two), names, strict=True) for n in k
    ]
    for other in saved[1:]:
        assert_same_weights(saved[0] / file, other / file)
        configs = [json.loads((folder / "config.json").read_text()) for folder in (saved[0], other)]
        assert [config.pop("lora_name", "lora").count("lora") for config in configs] == [1, 1]  # its own file
        assert configs[0] == configs[1]
    for process in range(2):
        assert close(both[process]["losses"], alone["losses"])
        assert again[process]["losses"] == {step: both[process]["losses"][step] for step in ("3", "4")}  # bitwise
        assert again[process]["random"] == both[process]["random"]
    assert both[0]["random"] != both[1]["random"]
    rest = {step: alone["losses"][step] for step in ("3", "4")}
    assert close(from_two["losses"], rest)
    assert close(from_one[0]["losses"], rest)
    assert from_two["random"] == both[0]["random"]


@pytest.mark.parametrize("mode", ["merged"])
def test_stock_moshi_serves_what_two_processes_saved(tmp_path, mode, patched):
    run(tmp_path, 2, f"{mode}:{tmp_path / 'run'}")
    checkpointer, state = prepare(tmp_path / "run", CTX, mode)
    path = checkpointer.find()
    checkpointer.load(path, state)
    loaded = served(path, None, torch.float64)
    assert relative(logits(loaded), logits(state.model)) < 1e-12
    assert_active(loaded)


def close(losses: dict, expected: dict) -> bool:
    return losses.keys() == expected.keys() and all(abs(losses[k] / expected[k] - 1) < 1e-10 for k in losses)


def assert_same_weights(one: Path, other: Path) -> None:
    """float64; AdamW divides by the size of gradients that are nothing but rounding, plus 1e-8."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    assert [name for name in first if "_fsdp" in name] == []
    assert {n: relative(first[n], second[n]) for n in first if not relative(first[n], second[n]) < 1e-7} == {}


def main(rank: int, world: int, result: str, jobs: list[str]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{Path(result).with_name('rendezvous')}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    moshi_patch.install()
    ctx = Context(rank, world, 0, torch.device("cpu"))
    Path(result).write_text(json.dumps([work(ctx, *job.split(":")) for job in jobs]))
    cleanup()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
