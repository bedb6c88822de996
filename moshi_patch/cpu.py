"""A model on the CPU: how many threads, and nothing compiled. What the environment says holds instead.

Threads wait for each other at the end of every operation. With small tensors, or where others use the machine too,
that takes longer than the operation: one thread is faster. Compiling a step takes longer than it saves on a CPU.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
NO_COMPILE = "NO_TORCH_COMPILE"
"""Variables that say otherwise; the second is read when moshi is imported, and empty lets it compile."""

LARGE = 1 << 22
"""Values of the largest weight matrix from which on all threads are used; in Moshi's layers from width 1024 on."""


def without_compiling_before_import() -> None:
    """Before moshi is imported: it will compile nothing."""
    os.environ.setdefault(NO_COMPILE, "1")


@contextlib.contextmanager
def without_compiling(device) -> Iterator[None]:
    """Inside, moshi compiles nothing for a CPU; `device` is a `torch.device`."""
    from moshi.utils.compile import no_compile

    with no_compile() if device.type == "cpu" and NO_COMPILE not in os.environ else contextlib.nullcontext():
        yield


def fit_threads(model) -> str | None:
    """One thread for this process if `model`, an `nn.Module`, is small and on the CPU.

    The number depends on the model alone, so that the same run computes the same numbers.

    Returns:
        A sentence on what was chosen, for people; None when it is not on a CPU, or the environment has chosen.
    """
    import torch

    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    if not weights or weights[0].device.type != "cpu" or any(os.environ.get(name) for name in THREADS):
        return None
    there = torch.get_num_threads()
    if max(weight.numel() for weight in weights) >= LARGE:
        return f"On the CPU with {there} threads (OMP_NUM_THREADS sets another number)."
    torch.set_num_threads(1)
    return f"On the CPU with 1 thread, as the model is small (OMP_NUM_THREADS={os.cpu_count()} sets another number)."


@contextlib.contextmanager
def fitted_threads() -> Iterator[None]:
    """Inside, `fit_threads` is done for each model that moshi loads; the first sentence of it goes to stderr."""
    from moshi.models import loaders

    stock, said = loaders.get_moshi_lm, []

    @functools.wraps(stock)
    def load(*args, **kwargs):
        model = stock(*args, **kwargs)
        sentence = fit_threads(model)
        if sentence and not said:
            said.append(sentence)
            print(sentence, file=sys.stderr)
        return model

    loaders.get_moshi_lm = load
    try:
        yield
    finally:
        loaders.get_moshi_lm = stock
