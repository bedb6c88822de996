"""Shared by the benchmarks: time and memory on CPU and CUDA, a description of the machine, the file of results."""

import argparse
import datetime
import itertools
import logging
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


def argument_parser(doc: str, device: bool = True) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark: `--device` (unless False), `--threads` and `--out`.

    Args:
        doc: the benchmark's docstring.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if device:
        parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU; fewer than cores on a busy machine")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line, applies `--threads` and lets the benchmark log its results."""
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return args


def synchronize(device: torch.device) -> None:
    """Waits until a CUDA device has finished; returns at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that one call takes, including the work on the device."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


class PeakMemory:
    """Measures by how many bytes the memory of tensors rises at most inside the `with` block: `bytes`, afterwards.

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
    """The same for the resident memory of the process. Linux only."""

    def __enter__(self) -> "ResidentPeak":
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak
        self._before = status_bytes("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        self.bytes = status_bytes("VmHWM") - self._before


def status_bytes(field: str) -> int:
    """A field of /proc/self/status that is given in kB, such as `VmRSS`, in bytes. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and date, for the results."""
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


def write_result(benchmark: str, args: argparse.Namespace, **results: Any) -> None:
    """Writes what one benchmark measured, with its settings and the machine, to `args.out`, if there is one."""
    if args.out is None:
        return
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(getattr(args, "device", "cpu"))
    write_json(args.out, {"benchmark": benchmark, "settings": settings, "machine": machine(device), **results})
