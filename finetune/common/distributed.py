"""One process or many, on CPU or CUDA, behind the same calls: who I am, my device, sums over all ranks."""

import contextlib
import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import ConfigError

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)
"""How long a rank waits for another: rank 0 reads and writes the weights of all, 15 GB for Moshi 7B."""


@dataclass(frozen=True)
class Context:
    """Where this process stands among all processes of the run, and its device."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def setup() -> Context:
    """Joins the processes that `torchrun` started; without it, this process alone is the run.

    NCCL for tensors on CUDA where that is available, gloo for those on the CPU. A process group that exists is used.

    Raises:
        ConfigError: when there are more processes on this machine than GPUs.
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        check_local_rank(local_rank, torch.cuda.device_count())
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        with _quiet_stdout():  # gloo prints how many it is connected to
            if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
                dist.init_process_group(backend, timeout=TIMEOUT)
            else:
                dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Context(dist.get_rank(), dist.get_world_size(), local_rank, device)


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """What libraries in C++ print inside is not shown; errors, which go to stderr, are."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # there is no stdout
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def check_local_rank(local_rank: int, gpus: int) -> None:
    """That the process `local_rank` of this machine, counted from 0, has one of its `gpus` for itself.

    Raises:
        ConfigError: when it has not.
    """
    if local_rank >= gpus:
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: each process needs a GPU of its own, and {gpus} can be seen here; start at most "
            f"{gpus}, with torchrun --nproc-per-node {gpus}, or make more visible with CUDA_VISIBLE_DEVICES."
        )


def cleanup() -> None:
    """Leaves the process group, if there is one. Call it when no sharded model is in use any more.

    Such a model, in reference cycles, keeps the group and its threads alive beyond this call; a thread that outlives
    the interpreter now and then ends a finished process with SIGABRT.
    """
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor: the sum of `tensor` over all ranks, the same on each."""
    total = tensor.detach().clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_over_ranks(mine: list[T]) -> list[T]:
    """What any rank has in `mine`, by rank, the same on each. Costs one number while nobody has anything.

    Args:
        mine: anything that can be pickled.
    """
    if dist.get_world_size() == 1 or not sum_over_ranks(torch.tensor(len(mine))):
        return mine
    everyone: list[list[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [item for part in everyone for item in part]


def on_rank_0(ctx: Context, action: Callable[[], T]) -> T:
    """The result of `action`, which runs on rank 0 alone while the others wait. Collective.

    Raises:
        Exception: what `action` raised, on every rank, so that none is left waiting.
    """
    outcome: list[Any] = [None, None]
    if ctx.rank == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
            if ctx.world_size > 1:
                outcome[1] = _sendable(error)
    if ctx.world_size > 1:
        dist.broadcast_object_list(outcome, src=0, device=ctx.device)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_all_ranks(ctx: Context, action: Callable[[], T]) -> T:
    """The result of `action`, which every rank runs for itself and which calls nothing collective. Collective.

    Raises:
        Exception: what `action` raised on this rank, or else on another, so that none is left waiting.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    if ctx.world_size > 1:
        errors: list[Any] = [None] * ctx.world_size
        dist.all_gather_object(errors, error and _sendable(error))
        error = error or next((other for other in errors if other is not None), None)
    if error is not None:
        raise error
    return result


def _sendable(error: Exception) -> Exception:
    """`error` itself, or its text when other processes could not be given it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the error of some library does
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
