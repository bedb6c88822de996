"""One of two gloo processes on the CPU: several training runs one after the other, and what this rank held and read.

Run as `python -m tests.support.training_worker FOLDER RANK WORLD_SIZE JOBS`: JOBS is a JSON
file with a list of settings.
"""

import contextlib
import json
import os
import resource
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from moshi.models import loaders
from safetensors import SafetensorError

from finetune.common.errors import ConfigError, DiskError
from finetune.data.broken import BrokenData
from finetune.settings.record import from_dict
from finetune.training import trainer, update
from finetune.training.signals import Stopped
from moshi_patch import stock_name

DIVERGES = "poison_step"
"""In a job: the step whose data makes the loss of rank 1, and of it alone, not finite."""

UNREADABLE = "unreadable"
"""In a job: the name of a file that rank 1, and it alone, cannot read, as on a machine with a bad disk."""

DISKS = "disks"
"""In a job: the working directory of each rank, as on machines with disks of their own."""

LOSES = "loses"
"""In a job: a file of its working directory that rank 1 no longer has when the model is loaded."""

STOPPED_IN = "stopped_in"
"""In a job: the step in which rank 1, and it alone, receives SIGTERM."""

MOVED = "moved"
"""In a job: report which parameters moved, those of which this rank holds a part."""

LARGEST_FILE = "largest_file"
"""In a job: the bytes of the largest file that rank 0 can write, as on a disk that is full."""


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def main(folder: Path, rank: int, world_size: int, jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    reports: list[dict] = []
    unreadable: str | None = None
    loses: str | None = None
    start: dict[str, torch.Tensor] = {}
    close = trainer.Trainer.close
    build, cleanup, load_file, step = trainer.build_model, trainer.cleanup, loaders.load_file, update.forward_loss

    def watched_build(args, ctx):
        built = build(args, ctx)
        if rank == 1 and loses is not None:
            Path(loses).unlink()
        tensors = [*built.model.named_parameters(), *built.model.named_buffers()]
        reports[-1]["meta"] = [name for name, tensor in tensors if tensor.is_meta]
        reports[-1]["wrapped"] = type(built.model).__name__
        if reports[-1]["moved"] is not None:
            start.update({name: p.detach().clone() for name, p in built.model.named_parameters()})
        reports[-1]["held"] = sum(parameter.numel() for parameter in built.model.parameters())
        return built

    def watched_load(path, *args, **kwargs):
        reports[-1]["read"].append(Path(path).name)
        if rank == 1 and Path(path).name == unreadable:
            raise SafetensorError("input/output error")
        return load_file(path, *args, **kwargs)

    def watched_close(self):
        if reports[-1]["moved"] is not None:
            own = dict(self.model.named_parameters())
            reports[-1]["moved"] = [stock_name(name) for name, p in start.items() if not torch.equal(own[name], p)]
        close(self)

    def watched_cleanup():
        inside = threads()
        cleanup()
        reports[-1]["threads"] += [inside, threads()]

    trainer.build_model, trainer.cleanup, loaders.load_file = watched_build, watched_cleanup, watched_load
    trainer.Trainer.close = watched_close
    for number, job in enumerate(jobs):
        start.clear()
        reports.append({"read": [], "threads": [threads()], "moved": [] if job.pop(MOVED, False) else None})
        poison, unreadable = job.pop(DIVERGES, None), job.pop(UNREADABLE, None)
        loses, disks, largest = job.pop(LOSES, None), job.pop(DISKS, None), job.pop(LARGEST_FILE, None)
        stopped_in, calls = job.pop(STOPPED_IN, None), []

        def loss(*args, poison=poison, stopped_in=stopped_in, calls=calls):
            calls.append(1)
            if len(calls) == stopped_in and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            parts = step(*args)
            if len(calls) == poison and rank == 1:
                parts.sums.mul_(float("nan"))
            return parts

        update.forward_loss = loss
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous{number}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 0 and largest is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
        try:
            with contextlib.chdir(disks[rank] if disks else os.curdir):
                trainer.train(from_dict(job))
        except (BrokenData, ConfigError, DiskError) as error:
            reports[-1]["error"] = str(error)
        except (Stopped, SystemExit) as end:
            reports[-1]["exit_code"] = end.exit_code if isinstance(end, Stopped) else end.code
            reports[-1]["error"] = str(end)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (folder / f"report{rank}.json").write_text(json.dumps(reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))
