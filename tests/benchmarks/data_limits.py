"""What the data plane takes at scale: the order of a billion samples, and memory over many epochs.

    uv run python tests/benchmarks/data_limits.py [SHARDS]

Prints one line for each; with SHARDS (a folder with an index) also the memory of ten epochs of 224-pixel
random crops. Each measurement runs in a process of its own, so that peaks are its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def order_of(shards: int, samples: int, batch: int, lanes: int, world_size: int, epoch_share: float) -> None:
    import numpy as np

    from resnet_dist.order.samples import Order

    before = peak_mib()
    start = time.perf_counter()
    order = Order((samples // shards,) * shards, batch, lanes, 4096, 0, training=True)
    own = order.lanes_of(world_size // 2, world_size)
    first = int(epoch_share * order.steps_per_epoch)
    order.ids_at(first, own)
    began = time.perf_counter() - start
    # To the end of the epoch, or all of it.
    last = order.steps_per_epoch
    ids = [order.ids_at(step, own) for step in range(first, last)]
    whole = time.perf_counter() - start
    peak = peak_mib() - before
    assert len(np.unique(np.concatenate(ids))) == (last - first) * len(own) * order.per_lane
    print(
        f"{samples:,} samples in {shards:,} shards, one of {world_size:,} ranks, from {epoch_share:.0%} of the epoch: "
        f"first batch {began:.2f} s, {last - first:,} steps {whole:.2f} s, {peak:.0f} MiB more"
    )


def memory_of(shards: str) -> None:
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
