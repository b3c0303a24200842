"""Run a function as ranks of a process group, each in a process of its own."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from resnet_dist.world import World

TIMEOUT_SECONDS = 250


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function(world, *arguments)` returned on each of `world_size` ranks, or the text of its error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("forkserver")  # it imports torch once, not once per rank
    # Preload torch._dynamo too: DistributedDataParallel imports it.
    context.set_forkserver_preload(["resnet_dist.train.loop", "torch._dynamo"])
    queue = context.Queue()
    processes = [
        context.Process(target=_run, args=(rank, world_size, port, queue, function, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=TIMEOUT_SECONDS) for _ in processes)
    finally:
        for process in processes:
            process.kill()  # a test may make a rank hang
            process.join()
    return [results[rank] for rank in range(world_size)]


def _run(
    rank: int, world_size: int, port: int, queue: Any, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    world = World.single()
    try:
        if world_size > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            world = World.from_environment(gpu=False, timeout_seconds=120)
        queue.put((rank, function(world, *arguments)))
    except Exception as error:
        traceback.print_exc()
        queue.put((rank, f"{type(error).__name__}: {error}"))
    queue.close()
    queue.join_thread()
