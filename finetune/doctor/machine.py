"""The machine and what is installed. What may be missing is imported late: its absence is a line, not a traceback."""

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from .finding import FAILED, OK, WARNING, Finding, guarded, in_units

SUPPORTED = {"python": ((3, 10), (3, 15)), "moshi": ((0, 2, 13), (0, 3)), "torch": ((2, 9, 1), (2, 13, 1))}
"""First version that is tested or, for Python, required, and the first one that is not."""

PACKAGES = (
    "numpy",
    "safetensors",
    "huggingface_hub",
    "sentencepiece",
    "sphn",
    "aiohttp",
    "einops",
    "simple_parsing",
    "yaml",
    "matplotlib",
    "tensorboard",
    "tqdm",
)
SCARCE = 2**30
"""Bytes of memory or disk below which hardly anything works."""


def check_machine(folder: Path) -> Iterator[Finding]:
    """Checks of this machine; the disk is that of `folder`."""
    yield _version("python", platform.python_version())
    yield _package("torch")
    yield _package("moshi")
    yield from guarded("packages", _packages)
    yield from guarded("patch", _patch)
    yield from guarded("cuda", _cuda)
    yield from guarded("memory", _memory)
    yield from guarded("disk", lambda: _disk(folder))


def available_memory() -> int | None:
    """Bytes of memory that can still be taken; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        names = os.sysconf_names if hasattr(os, "sysconf") else {}
        if "SC_AVPHYS_PAGES" not in names:
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _version(name: str, version: str) -> Finding:
    first, end = SUPPORTED[name]
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdecimal())
    if first <= numbers < end:
        return Finding(name, OK, version, details={"version": version})
    allowed = f"tested from {'.'.join(map(str, first))} up to, not including, {'.'.join(map(str, end))}"
    return Finding(name, WARNING, version, f"{allowed}; install one of these if anything fails", {"version": version})


def _package(name: str) -> Finding:
    try:
        module = importlib.import_module(name)
        version = importlib.metadata.version(name)
    except Exception as error:  # a broken installation raises anything, not ImportError alone
        return Finding(name, FAILED, f"cannot be imported: {type(error).__name__}: {error}", "pip install .")
    check = _version(name, version)
    return Finding(name, check.status, f"{version} in {Path(module.__file__).parent}", check.remedy, check.details)


def _packages() -> Iterator[Finding]:
    missing = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except Exception as error:
            missing.append(f"{name} ({type(error).__name__}: {error})")
    if missing:
        yield Finding("packages", FAILED, f"cannot be imported: {', '.join(missing)}", "pip install .")
    else:
        yield Finding("packages", OK, "all there")


def _patch() -> Iterator[Finding]:
    try:
        import moshi_patch
    except ImportError as error:
        yield Finding("patch", FAILED, f"moshi_patch cannot be imported: {error}", 'pip install "moshi>=0.2.13,<0.3"')
        return
    before = moshi_patch.is_installed()
    try:
        moshi_patch.install()
        applies = moshi_patch.is_installed()
        if not before:
            moshi_patch.uninstall()
    except RuntimeError as error:
        yield Finding("patch", FAILED, str(error), 'pip install "moshi>=0.2.13,<0.3"')
        return
    restored = moshi_patch.is_installed() == before
    if applies and restored:
        yield Finding("patch", OK, f"moshi_patch {moshi_patch.__version__} applies and can be taken back")
    else:
        yield Finding("patch", FAILED, "LMModel.__init__ was replaced by something else", "install moshi_patch last")


def _cuda() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda is None and Path("/proc/driver/nvidia").exists():
            remedy = "install the build of torch for your CUDA version"
            yield Finding("cuda", WARNING, "there is an NVIDIA driver, and this torch is built without CUDA", remedy)
        else:
            yield Finding("cuda", OK, "not available: the CPU is used", details={"devices": []})
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        details = {"device": name, "free_bytes": free, "total_bytes": total}
        text = f"{name}, CUDA {torch.version.cuda}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        low = free < SCARCE
        remedy = "another process fills it; nvidia-smi names it" if low else ""
        yield Finding(f"cuda:{index}", WARNING if low else OK, text, remedy, details)


def _memory() -> Iterator[Finding]:
    free = available_memory()
    if free is None:
        yield Finding("memory", WARNING, "this system does not say how much is free")
        return
    low = free < SCARCE
    remedy = "close something: loading takes the size of the weights" if low else ""
    yield Finding("memory", WARNING if low else OK, f"{in_units(free)} free", remedy, {"free_bytes": free})


def _disk(folder: Path) -> Iterator[Finding]:
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    low = free < SCARCE
    remedy = "make room: a checkpoint that does not fit is not saved" if low else ""
    yield Finding(
        "disk", WARNING if low else OK, f"{in_units(free)} free at {folder.resolve()}", remedy, {"free_bytes": free}
    )
