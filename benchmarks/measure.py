"""What the benchmarks share: a clock and a memory meter for CPU and CUDA, and the description of the machine."""

import argparse
import datetime
import itertools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moshi
import torch
from torch.profiler import ProfilerActivity

from finetune.common.files import write_json


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The option `--threads`, alike in every benchmark; `set_threads` makes it hold."""
    parser.add_argument("--threads", type=int, help="of torch on the CPU; fewer than cores on a busy machine")


def set_threads(args: argparse.Namespace) -> None:
    """Torch's threads on the CPU, as `--threads` says."""
    if args.threads:
        torch.set_num_threads(args.threads)


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds one call takes, device work included."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


class PeakMemory:
    """Bytes by which the memory held by tensors rises at most inside the `with` block, `bytes` afterwards.

    From torch's own allocators: repeatable, and without the scratch space of the libraries below them.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self.device.type == "cuda":
            synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profile.__exit__(*error)
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        self.bytes = max(itertools.accumulate((event.nbytes() for event in events), initial=0))


class ResidentPeak:
    """Bytes by which resident memory rises at most inside the `with` block, `bytes` afterwards. Linux only."""

    def __enter__(self) -> "ResidentPeak":
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak
        self._before = _status_bytes("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        self.bytes = _status_bytes("VmHWM") - self._before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to place a number: hardware, versions, date."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "moshi": moshi.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def write_result(path: Path, benchmark: str, args: argparse.Namespace, **results: Any) -> None:
    """Write what one benchmark measured, with its settings and the machine, to `path`; whole or not at all."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    device = torch.device(settings.get("device", "cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"benchmark": benchmark, "settings": settings, "machine": machine(device), **results})
