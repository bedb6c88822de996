"""One of two gloo processes on the CPU that evaluate the same benchmarks together.

Run as `python -m tests.support.published_worker BENCHMARKS REPO FOLDER RANK WORLD_SIZE`.
Writes `FOLDER/resultsRANK.json`.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import moshi_patch
from finetune.common.distributed import Context
from finetune.settings.evaluation import EvalArgs
from tests.support.published import evaluate, load_mimi, model_of, settings


def args_for(benchmarks: Path) -> EvalArgs:
    """Several batches and several files, so that each rank has some."""
    return settings(
        sblimp=str(benchmarks / "sLM21-dataset"),
        tstorycloze=str(benchmarks),
        longform=str(benchmarks / "longform"),
        batch_steps=150,
    )


def main(benchmarks: Path, repo: Path, folder: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    moshi_patch.install()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    context = Context(rank, world_size, rank, torch.device("cpu"))
    results = evaluate(model_of(0), load_mimi(repo), folder / "store", args_for(benchmarks), context)
    (folder / f"results{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
