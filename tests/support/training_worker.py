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

EVENTS = (DIVERGES, UNREADABLE, DISKS, LOSES, STOPPED_IN, MOVED, LARGEST_FILE)
"""All of them; the rest of a job are the settings of its training."""


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


class Watch:
    """Stands in for functions of the trainer: makes happen in each job what it says, and reports on it."""

    def __init__(self, rank: int):
        self.reports: list[dict] = []
        self._rank, self._events, self._calls = rank, {}, 0
        self._start: dict[str, torch.Tensor] = {}
        self._build, self._cleanup, self._close = trainer.build_model, trainer.cleanup, trainer.Trainer.close
        self._load_file, self._loss = loaders.load_file, update.forward_loss
        trainer.build_model, trainer.cleanup = self.build, self.cleanup
        trainer.Trainer.close = lambda own: self.close(own)
        loaders.load_file, update.forward_loss = self.load_file, self.loss

    def begin(self, events: dict) -> None:
        """Before a job."""
        self._events, self._calls = events, 0
        self._start.clear()
        self.reports.append({"read": [], "threads": [threads()], "moved": [] if events.get(MOVED) else None})

    def build(self, args, ctx):
        built = self._build(args, ctx)
        if self._on_rank_1(LOSES) is not None:
            Path(self._events[LOSES]).unlink()
        report, tensors = self.reports[-1], [*built.model.named_parameters(), *built.model.named_buffers()]
        report["meta"] = [name for name, tensor in tensors if tensor.is_meta]
        report["wrapped"] = type(built.model).__name__
        if report["moved"] is not None:
            self._start.update({name: p.detach().clone() for name, p in built.model.named_parameters()})
        report["held"] = sum(parameter.numel() for parameter in built.model.parameters())
        return built

    def load_file(self, path, *args, **kwargs):
        self.reports[-1]["read"].append(Path(path).name)
        if Path(path).name == self._on_rank_1(UNREADABLE):
            raise SafetensorError("input/output error")
        return self._load_file(path, *args, **kwargs)

    def loss(self, *args):
        self._calls += 1
        if self._calls == self._on_rank_1(STOPPED_IN):
            os.kill(os.getpid(), signal.SIGTERM)
        parts = self._loss(*args)
        if self._calls == self._on_rank_1(DIVERGES):
            parts.sums.mul_(float("nan"))
        return parts

    def close(self, own: trainer.Trainer) -> None:
        if self.reports[-1]["moved"] is not None:
            now = dict(own.model.named_parameters())
            moved = [name for name, before in self._start.items() if not torch.equal(now[name], before)]
            self.reports[-1]["moved"] = [stock_name(name) for name in moved]
        self._close(own)

    def cleanup(self) -> None:
        inside = threads()
        self._cleanup()
        self.reports[-1]["threads"] += [inside, threads()]

    def _on_rank_1(self, event: str):
        return self._events.get(event) if self._rank == 1 else None


@contextlib.contextmanager
def full_disk(largest: int | None):
    """Inside, no file can have more bytes than `largest`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run(job: dict, events: dict, rank: int, report: dict) -> None:
    """One training run; how it ended stands in `report`."""
    folders = events.get(DISKS)
    try:
        with (
            full_disk(events.get(LARGEST_FILE) if rank == 0 else None),
            contextlib.chdir(folders[rank] if folders else os.curdir),
        ):
            trainer.train(from_dict(job))
    except (BrokenData, ConfigError, DiskError) as error:
        report["error"] = str(error)
    except (Stopped, SystemExit) as end:
        report["exit_code"] = end.exit_code if isinstance(end, Stopped) else end.code
        report["error"] = str(end)


def main(folder: Path, rank: int, world_size: int, jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    watch = Watch(rank)
    for number, job in enumerate(jobs):
        events = {event: job.pop(event) for event in EVENTS if event in job}
        watch.begin(events)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous{number}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=30),
        )
        run(job, events, rank, watch.reports[-1])
    (folder / f"report{rank}.json").write_text(json.dumps(watch.reports))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))
