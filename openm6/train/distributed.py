"""The process group: started by torchrun or a single process, joined and torn down cleanly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor

from openm6.core.errors import OpenM6Error

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

MEETING = timedelta(seconds=120)
"""Time limit for all processes to connect; without it, one that dies meanwhile would leave the others waiting."""

WORK = timedelta(hours=2)
"""Longest wait for another process: the first one evaluates and writes alone."""


@dataclass(frozen=True, slots=True)
class Group:
    """This process among all: rank of world, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over the processes."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def process_group() -> Iterator[Group]:
    """Join the processes that torchrun started (NCCL on GPUs, gloo on CPUs); alone without torchrun.

    Leaving tears the group down: a process that exits with a live gloo group can abort after its work is done.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield Group(0, 1, device)
        return
    if dist.is_initialized():  # by who started the processes (Ray), who also ends it
        yield Group(dist.get_rank(), world, device)
        return
    try:
        store, rank, _ = next(dist.rendezvous("env://", timeout=MEETING))
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # torchrun keeps its store over restarts, with the addresses of processes that are dead. On several hosts
            # restarts are counted apart: there torchrun has to make a new one (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1).
            store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=MEETING)
    except (RuntimeError, ValueError) as error:
        raise OpenM6Error(
            f"The {world} processes did not meet within {MEETING.seconds} s ({str(error).splitlines()[0]}): "
            "has one died, or is MASTER_ADDR out of reach?"
        ) from None
    dist.distributed_c10d._set_pg_timeout(WORK, dist.group.WORLD)
    try:
        yield Group(dist.get_rank(), world, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """True for a DTensor. The test does not import the class, which takes half as long as PyTorch's import: a single
    process has no DTensors."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; a collective call of the processes that hold it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a full tensor that is sharded as `like` is."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()


def rows_of(tensor: Tensor) -> tuple[int, int]:
    """The rows of a tensor on this process: the first, and the one after the last."""
    if not is_sharded(tensor):
        return 0, len(tensor)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    assert shape[1:] == tensor.shape[1:], "cut along another dimension than the first"
    return offset[0], offset[0] + shape[0]
