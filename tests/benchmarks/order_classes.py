"""Classes in the batches of an epoch, shards in use and shards fetched, for both versions of the order.

    uv run python tests/benchmarks/order_classes.py [EPOCHS]

The set is as bad as a set can be: as many samples as ImageNet has, in 1,282 shards, sorted by class. It is simulated:
only sample ids are drawn. Prints one line for each version, means over EPOCHS epochs, 3 by default.
"""

from __future__ import annotations

import sys
from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from resnet_dist.order.samples import Order
from resnet_dist.order.versions import VERSIONS

SAMPLES, SHARDS, CLASSES = 1_281_167, 1282, 1000
BATCH, LANES, WINDOW = 1024, 64, 4096
NODES, SHARDS_PER_CACHE = 8, 48  # a cache that holds six shards for each of a node's lanes
COUNTS = np.full(SHARDS, SAMPLES // SHARDS) + (np.arange(SHARDS) < SAMPLES % SHARDS)


def epoch_of(order: Order, epoch: int) -> NDArray[np.int64]:
    """Return the sample ids of an epoch, (steps, lanes, samples of a step in a lane)."""
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    return np.stack([order.ids_at(step, range(LANES)).reshape(LANES, -1) for step in steps])


def shards_in_use(shards: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean number of shards per lane that a step reads or has begun and not finished, by step."""
    steps = len(shards)
    in_use = np.zeros(steps + 1)
    for lane in range(LANES):
        for shard in np.unique(shards[:, lane]):
            (read,) = np.nonzero((shards[:, lane] == shard).any(axis=1))
            in_use[read[0]] += 1
            in_use[read[-1] + 1] -= 1
    return np.cumsum(in_use)[:steps] / LANES


def fetched(shards: NDArray[np.int64], max_kept: int) -> tuple[int, int]:
    """Return the fetches of all nodes in an epoch, and the most of one before its first batch.

    A node keeps the `max_kept` shards that it used last.
    """
    num_fetched, at_start = 0, 0
    for node_shards in np.split(shards, NODES, axis=1):
        kept: OrderedDict[int, None] = OrderedDict()
        for needed in node_shards:
            for shard in np.unique(needed).tolist():
                num_fetched += shard not in kept
                kept[shard] = None
                kept.move_to_end(shard)
            while len(kept) > max_kept:
                kept.popitem(last=False)
        at_start = max(at_start, len(np.unique(node_shards[0])))
    return num_fetched, at_start


def measures(version: int, epoch: int) -> dict[str, float]:
    order = Order(tuple(COUNTS.tolist()), BATCH, LANES, WINDOW, 0, training=True, version=version)
    ids = epoch_of(order, epoch)
    classes = [len(np.unique(step_ids * CLASSES // SAMPLES)) for step_ids in ids]
    shards = np.searchsorted(np.cumsum(COUNTS), ids, side="right")
    in_use = shards_in_use(shards)
    num_fetched, at_start = fetched(shards, SHARDS_PER_CACHE)
    return {
        "classes in the first batch": classes[0],
        "in the 2nd to 11th": float(np.mean(classes[1:11])),
        "in the middle": classes[len(classes) // 2],
        "in the last": classes[-1],
        "fewest": min(classes),
        "mean": float(np.mean(classes)),
        "shards in use per lane, mean": float(in_use.mean()),
        "most": float(in_use.max()),
        "fetches per shard, small cache": num_fetched / SHARDS,
        "large cache": fetched(shards, SHARDS)[0] / SHARDS,
        "a node's fetches before the first batch": at_start,
    }


if __name__ == "__main__":
    num_epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    for number in VERSIONS:
        rows = [measures(number, epoch) for epoch in range(num_epochs)]
        means = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
        print(f"version {number}: " + ", ".join(f"{name} {value:.4g}" for name, value in means.items()))
