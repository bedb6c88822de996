"""One process or many, on CPU or CUDA, behind the same calls: who I am, my device, sums over all ranks."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

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
    """
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend, timeout=TIMEOUT)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Context(dist.get_rank(), dist.get_world_size(), local_rank, device)


def cleanup() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
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
