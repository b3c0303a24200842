"""The shards that the nodes of a cluster fetch and keep in one epoch, simulated by the order and the loader's own rule.

No shard is read. A node's cache drops the shards that were requested longest ago, as a real one does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resnet_dist.order.samples import Order

# Points of an epoch at which a node is looked at. Between two of them it requests what lies between.
MAX_POINTS = 400
MAX_NODES = 4  # that are looked at step by step; every node is counted


@dataclass(frozen=True)
class Traffic:
    """The shards of all nodes in an epoch that begins with empty caches."""

    num_fetched: int
    first_batch: int  # shards of one node that its first batch waits for, at most
    kept: int  # shards that one node needs at the same time, at most


def simulate(order: Order, nodes: int, ranks_per_node: int, cache_shards: int) -> Traffic:
    """Return the traffic of an epoch. cache_shards: what the cache of a node holds.

    Raises ValueError where that many ranks do not divide the lanes.
    """
    ranks = [order.lanes_of(rank, nodes * ranks_per_node) for rank in range(nodes * ranks_per_node)]
    by_node = [ranks[first : first + ranks_per_node] for first in range(0, len(ranks), ranks_per_node)]
    distinct = [len(shards_of_epoch(order, node)) for node in by_node]
    seen = [number * nodes // min(nodes, MAX_NODES) for number in range(min(nodes, MAX_NODES))]
    walks = [walk(order, by_node[number], cache_shards) for number in seen]
    # A cache that is too small fetches shards again: by this factor, of the nodes that were followed.
    again = sum(fetched for fetched, _ in walks) / sum(distinct[number] for number in seen)
    return Traffic(
        round(sum(distinct) * again),
        max(len(shards_of_first_batch(order, by_node[number])) for number in seen),
        max(kept for _, kept in walks),
    )


def shards_of_epoch(order: Order, node: Sequence[range]) -> set[int]:
    """Return the shards that a node requests in the first epoch. node: the lanes of each of its ranks."""
    return {shard for lanes in node for shard in order.shards_ahead(0, lanes, order.steps_per_epoch)}


def shards_of_first_batch(order: Order, node: Sequence[range]) -> set[int]:
    """Return the shards that hold the samples of a node in the first step."""
    ids = np.concatenate([order.ids_at(0, lanes) for lanes in node])
    return set(np.searchsorted(np.cumsum(order.counts), ids, side="right").tolist())


def walk(order: Order, node: Sequence[range], cache_shards: int) -> tuple[int, int]:
    """Follow a node through the first epoch; return the shards it fetches, and the most that it needs at one time."""
    steps = order.steps_per_epoch
    stride = -(-steps // MAX_POINTS)
    cache: OrderedDict[int, None] = OrderedDict()
    wanted = [set[int]() for _ in node]
    num_fetched = max_kept = 0
    for step in range(0, steps, stride):
        for number, lanes in enumerate(node):
            ahead = order.shards_ahead(step, lanes, min(stride + order.fetch_steps, steps - step))
            for shard in ahead:
                # A rank requests a shard once; after that its file counts as used when it is opened again.
                if shard not in wanted[number] or shard not in cache:
                    num_fetched += shard not in cache
                    cache[shard] = None
                    cache.move_to_end(shard)
                    if len(cache) > max(1, cache_shards):
                        cache.popitem(last=False)
            wanted[number] = set(ahead)
        max_kept = max(max_kept, len(set().union(*wanted)))
    return num_fetched, max_kept
