"""The change of a cluster for which ranks stop and start again: a node leaves, or there is room for more of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from ray._private.state import state as cluster_state

from resnet_dist.launch.on_ray.placement.fit import Node, Placement, capacity
from resnet_dist.launch.on_ray.placement.nodes import draining, nodes

LOOK_SECONDS = 1.0  # between two looks at the nodes
# A larger number of ranks must fit for so long before it is used: nodes often join in groups.
SETTLING_SECONDS = 30.0


class ClusterWatch:
    """Looks at the cluster while ranks train, and finds the change for which they stop and start again."""

    def __init__(
        self,
        placement: Placement,
        sizes: Sequence[int],
        hosts: Callable[[], Sequence[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watch over the ranks of `placement`. hosts: returns the ids of the nodes that they are on."""
        self._placement, self._hosts, self._clock = placement, hosts, clock
        self._larger = [size for size in sizes if size > placement.workers]
        self._look_at = 0.0
        self._fits_since = math.inf

    def look(self) -> str | None:
        """Return the reason to start the ranks anew, or None; at most every LOOK_SECONDS it asks the cluster."""
        now = self._clock()
        if now < self._look_at:
            return None
        self._look_at = now + LOOK_SECONDS
        ranks_on = Counter(self._hosts())
        if leaving := [node_id for node_id in draining() if node_id in ranks_on]:
            return f"{len(leaving)} node(s) with ranks are being taken away"
        return self._growth(now, ranks_on) if self._larger else None

    def _growth(self, now: float, ranks_on: Mapping[str, int]) -> str | None:
        room = _room(nodes(), self._placement, ranks_on)
        if room < self._larger[-1]:
            self._fits_since = math.inf
            return None
        self._fits_since = min(self._fits_since, now)
        if now - self._fits_since < SETTLING_SECONDS:
            return None
        size = next(size for size in self._larger if size <= room)
        return f"the cluster has room for {size} ranks instead of {self._placement.workers}"


def _room(alive: Sequence[Node], placement: Placement, ranks_on: Mapping[str, int]) -> int:
    """Return the number of such ranks that fit into what other jobs leave free."""
    free = cluster_state.available_resources_per_node()
    left = []
    for node in alive:
        available, own = free.get(node.node_id, {}), ranks_on.get(node.node_id, 0)
        cpus = available.get("CPU", 0) + own * placement.cpus
        left.append(Node(cpus, available.get("GPU", 0) + (own if placement.gpu else 0)))
    return capacity(left, placement.cpus, gpu=placement.gpu)
