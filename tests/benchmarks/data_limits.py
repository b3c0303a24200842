"""Time and memory of the data plane at scale: the order of a billion samples, and the loader over many epochs.

    uv run python tests/benchmarks/data_limits.py [SHARDS]

It prints one line for each measurement; with SHARDS (a folder with an index) also the memory of ten epochs of
224-pixel random crops. Each measurement runs in its own process, so that its peak memory is its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time


def peak_mib() -> float:
    """Return the peak memory of this process in MiB, on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def order_of(shards: int, samples: int, batch: int, lanes: int, world_size: int, epoch_share: float) -> None:
    """Print the time and the memory for the order of one rank, from `epoch_share` of the epoch to its end."""
    import numpy as np

    from resnet_dist.order.samples import Order

    before_mib = peak_mib()
    start = time.perf_counter()
    order = Order((samples // shards,) * shards, batch, lanes, 4096, 0, training=True)
    own = order.lanes_of(world_size // 2, world_size)
    first = int(epoch_share * order.steps_per_epoch)
    order.ids_at(first, own)
    first_seconds = time.perf_counter() - start
    last = order.steps_per_epoch
    ids = [order.ids_at(step, own) for step in range(first, last)]
    all_seconds = time.perf_counter() - start
    more_mib = peak_mib() - before_mib
    assert len(np.unique(np.concatenate(ids))) == (last - first) * len(own) * order.per_lane
    print(
        f"{samples:,} samples in {shards:,} shards, one of {world_size:,} ranks, from {epoch_share:.0%} of the epoch: "
        f"first batch {first_seconds:.2f} s, {last - first:,} steps {all_seconds:.2f} s, {more_mib:.0f} MiB more"
    )


def memory_of(shards: str) -> None:
    """Print the peak memory of a loader after one epoch and after ten."""
    import torch

    from resnet_dist.config import Data
    from resnet_dist.data.batches.loader import Loader
    from resnet_dist.data.shards.index import read_index
    from resnet_dist.order.samples import Order
    from resnet_dist.world import World

    torch.set_num_threads(2)
    fields = {"crop": "random-resized-crop", "flip": True, "loader_workers": 2}
    data = Data(train=shards, eval=shards, image_size=224, global_batch_size=40, **fields)
    index = read_index(shards)
    order = Order(index.counts, 40, 8, 4096, 0, training=True)
    peaks = []
    with Loader(index, order, data, World.single(), seed=0) as loader:
        for epoch in range(10):
            for step in range(order.steps_per_epoch):
                loader.batch_at(epoch * order.steps_per_epoch + step)
            peaks.append(peak_mib())
    print(
        f"{index.num_samples:,} images, ten epochs: {peaks[0]:.0f} MiB after the first, {peaks[-1]:.0f} MiB after the "
        f"tenth, {peaks[-1] / peaks[0] - 1:+.1%}"
    )


def alone(function: object, *arguments: object) -> None:
    """Call a function in a new process."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)  # type: ignore[arg-type]
    process.start()
    process.join()
    assert process.exitcode == 0


if __name__ == "__main__":
    for share in (0.0, 0.5):
        alone(order_of, 100_000, 1_000_000_000, 8192, 1024, 1024, share)
    alone(order_of, 1282, 1_281_167 // 1282 * 1282, 1024, 64, 1, 0.0)
    alone(order_of, 1282, 1_281_167 // 1282 * 1282, 1024, 64, 8, 0.5)
    if len(sys.argv) > 1:
        alone(memory_of, sys.argv[1])
