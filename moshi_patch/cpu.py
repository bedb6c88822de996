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
        What holds now, in words; None for a model that is not on a CPU.
    """
    import torch

    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    if not weights or weights[0].device.type != "cpu":
        return None
    why = ""
    if max(weight.numel() for weight in weights) < LARGE and not any(os.environ.get(name) for name in THREADS):
        torch.set_num_threads(1)
        why = ", as the model is small"
    number = torch.get_num_threads()
    compiling = "moshi compiles" if os.environ.get(NO_COMPILE) == "" else "nothing is compiled"
    return (
        f"On the CPU: {number} thread{'s' * (number > 1)}{why}; {compiling}. "
        f"{THREADS[0]} and {NO_COMPILE} in the environment say otherwise."
    )


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
