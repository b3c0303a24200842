"""Run a function on several ranks of this machine, one process each, as torchrun would."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import spawn

from resnet_dist.system.cpus import cpu_count
from resnet_dist.world import World

# A function at module level, (world, *arguments) → a value that can be pickled.
RankMain = Callable[..., Any]


def run_ranks(main: RankMain, world_size: int, *arguments: Any, gpu: bool) -> list[Any]:
    """Call `main(world, *arguments)` on every rank, and return the results in rank order.

    The ranks share the CPUs evenly. Raises torch's ProcessException where a rank fails, after ending the others.
    """
    results = mp.get_context("spawn").SimpleQueue()
    shared = (main, world_size, _free_port(), gpu, results, arguments)
    context = spawn(_start, args=shared, nprocs=world_size, join=False)
    while not context.join():
        pass
    by_rank = dict(results.get() for _ in range(world_size))
    return [by_rank[rank] for rank in range(world_size)]


def _start(
    rank: int, main: RankMain, world_size: int, port: int, gpu: bool, results: Any, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(max(1, cpu_count() // world_size))
    world = World.single(gpu=gpu)
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        world = World.from_environment(gpu=gpu)
    results.put((rank, main(world, *arguments)))
    if world_size > 1:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
