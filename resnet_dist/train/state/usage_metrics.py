"""The metrics of the machines of a run: as many keys for a thousand machines as for two.

Shapes: R ranks, Q quantities, S places in the summary of a quantity; only one rank of each machine has counts above 0.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from resnet_dist.system.memory import ranks_of_this_node
from resnet_dist.system.node.usage import (
    COUNT,
    MAX,
    MEAN,
    MIN,
    NUM_SUMMARY,
    QUANTITIES,
    NodeUsage,
    start_usage,
)
from resnet_dist.world import World

NUM_USAGE = len(QUANTITIES) * NUM_SUMMARY
PREFIX = "system"  # MLflow's page shows these keys under "System metrics".


def usage_of(world: World) -> NodeUsage:
    """Start to sample this machine where this rank is the first on it."""
    first = world.local_rank == 0
    return start_usage(_gpu_uuids() if first and world.device.type == "cuda" else [], samples=first)


def usage_metrics(usage_RV: Tensor, *, per_node: bool) -> dict[str, float]:
    """Return the mean of each quantity over all machines or GPUs, with minimum and maximum where there are several.

    usage_RV: R summaries, as NodeUsage.summary() returns them. per_node: with the mean of each machine.
    """
    nodes_NQS = usage_RV.reshape(len(usage_RV), len(QUANTITIES), NUM_SUMMARY)
    nodes_NQS = nodes_NQS[nodes_NQS[:, :, COUNT].sum(dim=1) > 0]
    metrics: dict[str, float] = {}
    for number, name in enumerate(QUANTITIES):
        known_NS = nodes_NQS[nodes_NQS[:, number, COUNT] > 0, number]
        if not len(known_NS):
            continue
        things = float(known_NS[:, COUNT].sum())
        metrics[f"{PREFIX}/{name}"] = float((known_NS[:, COUNT] * known_NS[:, MEAN]).sum()) / things
        if things > 1:
            metrics[f"{PREFIX}/{name}_min"] = float(known_NS[:, MIN].min())
            metrics[f"{PREFIX}/{name}_max"] = float(known_NS[:, MAX].max())
    if per_node:
        for node, summary_QS in enumerate(nodes_NQS):
            metrics |= {
                f"{PREFIX}/node_{node}/{name}": float(summary_QS[number, MEAN])
                for number, name in enumerate(QUANTITIES)
                if summary_QS[number, COUNT]
            }
    return metrics


def _gpu_uuids() -> list[str]:
    """Return the UUIDs of the GPUs that the ranks of this machine train on, as NVML takes them."""
    count = min(ranks_of_this_node(), torch.cuda.device_count())
    # A slice of a GPU has a UUID of its own, which torch does not know.
    slices = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.startswith("MIG-")]
    return slices[:count] or [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]
