"""World: the rank of this process, the device of its tensors, and the few collectives that the loop needs.

Ray Train, torchrun and a single process differ only in who makes the World; the loop sees no difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """One rank among the `world_size` ranks of a run. With one rank, every collective is a local copy."""

    rank: int
    local_rank: int  # the rank on this node
    world_size: int
    device: torch.device
    cpus: int | None = None  # of this rank, for its decoding threads; None: as many as torch has threads

    @classmethod
    def single(cls, *, gpu: bool = False) -> World:
        """Return the World of one process, without a process group."""
        return cls(0, 0, 1, torch.device("cuda", 0) if gpu else torch.device("cpu"))

    @classmethod
    def join(
        cls,
        store: Any,
        *,
        rank: int,
        local_rank: int,
        world_size: int,
        gpu: bool,
        timeout_seconds: float = 1800,
    ) -> World:
        """Set up, as rank `rank`, the process group of the ranks that meet in `store`; return its World."""
        device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        timeout = timedelta(seconds=timeout_seconds)
        # `init_process_group` limits only a store of its own. New groups and their first collectives wait in the store.
        store.set_timeout(timeout)
        dist.init_process_group(
            "nccl" if gpu else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
        )
        return cls(rank, local_rank, world_size, device)

    @classmethod
    def from_environment(cls, *, gpu: bool, timeout_seconds: float = 1800) -> World:
        """Join the process group that torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR …) describes."""
        store, rank, world_size = next(rendezvous("env://"))
        local_rank = int(os.environ["LOCAL_RANK"])
        return cls.join(
            store,
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            gpu=gpu,
            timeout_seconds=timeout_seconds,
        )

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return `tensor` summed over the ranks, as a new tensor of the same shape."""
        total = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def begin_sum(self, tensor: torch.Tensor) -> Callable[[], object]:
        """Begin to sum `tensor` over the ranks, in place; return a function that waits for the sum."""
        if self.world_size == 1:
            return lambda: None
        wait: Callable[[], object] = dist.all_reduce(tensor, async_op=True).wait
        return wait

    def stack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return every rank's `tensor`, in rank order: (world_size, *shape)."""
        if self.world_size == 1:
            return tensor[None].clone()
        stacked = tensor.new_empty(self.world_size, *tensor.shape)
        dist.all_gather(list(stacked), tensor)
        return stacked

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's `value` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Return every rank's `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Value] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
