"""The threads that decode: how many a rank has, and how the samples of a batch are divided among them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from resnet_dist.config import Data
from resnet_dist.data.images.augment import recolors
from resnet_dist.data.shards.index import Index

# A task should be large, since submitting it costs as much as decoding a tiny image, and small, since a batch is
# ready only when its last task is done.
MAX_PIXELS_PER_TASK, MAX_SAMPLES_PER_TASK = 16 * 224 * 224, 128
# Images below both limits are decoded by one thread, see `threads_for`.
SMALL_SAMPLE_BYTES = 8 * 2**10  # the mean size of a small sample in its shard, headers included
SMALL_SIZE = 64  # pixels: resizing to more takes longer than the part of the work that holds the GIL


def start_threads(count: int) -> ThreadPoolExecutor:
    """Start a pool of threads in which torch uses no threads of its own: their busy waiting would slow decoding.

    torch keeps this number per thread, but a thread that reads it for the first time gets the value that any thread
    set last. So every thread reads and sets it here, and the caller's value is set once more at the end.
    """

    def work_alone() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "decode", initializer=work_alone)
    all_started = threading.Barrier(count)
    try:
        for waiting in [pool.submit(all_started.wait) for _ in range(count)]:
            waiting.result()
    finally:
        all_started.abort()
        torch.set_num_threads(before)
    return pool


def threads_for(index: Index, data: Data, size: int, cpus: int | None) -> int:
    """Return the number of threads: one per CPU of this rank, but a single one for decoding small images.

    Small images spend most of their time under the GIL, and two threads that take turns are slower than one, by a
    quarter on CIFAR-10.
    """
    bytes_known = all(shard.num_bytes for shard in index.shards if shard.num_samples)
    num_bytes = sum(shard.num_bytes for shard in index.shards)
    small = bytes_known and num_bytes < SMALL_SAMPLE_BYTES * index.num_samples
    if small and size <= SMALL_SIZE and data.cache == "none" and not recolors(data):
        return 1
    return cpus or torch.get_num_threads()


def parts_of(rows_MR: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Cut the samples of a batch into tasks for threads."""
    num_images = min(MAX_SAMPLES_PER_TASK, max(1, MAX_PIXELS_PER_TASK // size**2))
    num_samples = max(1, num_images // rows_MR.shape[1])
    return [rows_MR[low : low + num_samples] for low in range(0, len(rows_MR), num_samples)]
