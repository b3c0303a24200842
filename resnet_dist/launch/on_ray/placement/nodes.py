"""The nodes of the connected cluster: which are alive, which are being taken away, and what is free on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import ray
from ray._private.state import state as cluster_state

from resnet_dist.launch.on_ray.placement.fit import Node


def nodes() -> list[Node]:
    """Return the nodes of the connected cluster that are alive and are not being taken away."""
    leaving = draining()
    return [
        Node(
            node["Resources"].get("CPU", 0),
            node["Resources"].get("GPU", 0),
            node["NodeManagerHostname"],
            node["NodeID"],
            node["Resources"].get("memory", math.inf),
        )
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in leaving
    ]


def draining() -> dict[str, float]:
    """Return the nodes that are being taken away, by id, with the Unix time of their end; 0: unknown."""
    deadlines: dict[str, int] = cluster_state.get_draining_nodes()
    return {node_id: deadline_ms / 1000 for node_id, deadline_ms in deadlines.items()}


def free_parts(nodes: Sequence[Node]) -> list[Node]:
    """Return what nobody uses of each of these nodes of the connected cluster."""
    free = cluster_state.available_resources_per_node()
    return [
        replace(
            node,
            cpus=free.get(node.node_id, {}).get("CPU", 0),
            gpus=free.get(node.node_id, {}).get("GPU", 0),
        )
        for node in nodes
    ]
