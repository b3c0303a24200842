"""World: which rank this process is, where its tensors live, and the few collectives the loop needs.

Ray Train, torchrun and a single process differ only in who makes the World; the loop sees no difference.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @classmethod
    def single(cls, *, gpu: bool = False) -> World:
        """One process and no process group."""
        return cls(0, 0, 1, torch.device("cuda", 0) if gpu else torch.device("cpu"))

    @classmethod
    def from_process_group(cls, *, local_rank: int, device: torch.device) -> World:
        """The World of a process group that somebody has set up: Ray Train, or `init_process_group`."""
        return cls(dist.get_rank(), local_rank, dist.get_world_size(), device)

    @classmethod
    def from_environment(cls, *, gpu: bool, timeout_seconds: float = 1800) -> World:
        """Join the process group that torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR …) describes."""
        local_rank = int(os.environ["LOCAL_RANK"])
        device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
        if gpu:
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout_seconds))
        return cls.from_process_group(local_rank=local_rank, device=device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` summed over the ranks, as a new tensor of the same shape."""
        total = tensor.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def begin_sum(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """`sum`, beside whatever comes next: what is returned waits for it and gives the total."""
        total = tensor.clone()
        work = dist.all_reduce(total, async_op=True) if self.world_size > 1 else None

        def finish() -> torch.Tensor:
            if work is not None:
                work.wait()
            return total

        return finish

    def broadcast(self, value: Value) -> Value:
        """Rank 0's `value`, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Value) -> list[Value]:
        """Every rank's `value`, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Value] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()
