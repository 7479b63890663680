"""Several processes that train one model together, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


class Place(NamedTuple):
    """This process among those that train together."""

    rank: int
    world: int
    """How many there are."""


def place() -> Place:
    """Where this process stands; alone it is the first of one."""
    if dist.is_available() and dist.is_initialized():
        return Place(dist.get_rank(), dist.get_world_size())
    return Place(0, 1)


@contextmanager
def together() -> Iterator[Place]:
    """Joins the other processes for the block, if torchrun started this one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield place()
        return
    # DistributedDataParallel imports this module, whose functions have the group of that moment as
    # default arguments. If that is ours, the group outlives its end, and its threads the
    # interpreter: one that then frees a tensor aborts the process.
    import torch.distributed.nn.functional

    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield place()
        dist.barrier()  # nobody leaves while others still talk
    finally:
        dist.destroy_process_group()


def from_first(compute: Callable[[], T]) -> T:
    """What the first process computes, in all of them: where they must not come to differ."""
    rank, world = place()
    if world == 1:
        return compute()
    found: list[T | None] = [compute() if rank == 0 else None]
    dist.broadcast_object_list(found)
    return cast(T, found[0])


def device() -> torch.device:
    """The GPU of this process, if there are any; torchrun numbers the processes of a machine."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
