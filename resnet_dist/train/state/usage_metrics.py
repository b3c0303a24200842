"""The metrics of the machines of a run: as many keys for a thousand machines as for two.

Shapes: R ranks, N machines, Q quantities, S places in the summary of a quantity, V values of a rank; one rank of each
machine has counts above 0.
"""

from __future__ import annotations

import os

import numpy as np
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
    # NumPy: a dozen operations on tensors this small would take as long as a log line.
    nodes_NQS = usage_RV.numpy().reshape(-1, len(QUANTITIES), NUM_SUMMARY)
    nodes_NQS = nodes_NQS[nodes_NQS[:, :, COUNT].any(axis=1)]
    counts_NQ, means_NQ = nodes_NQS[:, :, COUNT], nodes_NQS[:, :, MEAN]
    known_NQ, things_Q = counts_NQ > 0, counts_NQ.sum(axis=0)
    means_Q = (counts_NQ * means_NQ).sum(axis=0) / np.maximum(things_Q, 1)
    lowest_Q = np.where(known_NQ, nodes_NQS[:, :, MIN], np.inf).min(axis=0, initial=np.inf)
    highest_Q = np.where(known_NQ, nodes_NQS[:, :, MAX], -np.inf).max(axis=0, initial=-np.inf)
    metrics: dict[str, float] = {}
    for number, name in enumerate(QUANTITIES):
        if things_Q[number] > 0:
            metrics[f"{PREFIX}/{name}"] = float(means_Q[number])
        if things_Q[number] > 1:
            metrics[f"{PREFIX}/{name}_min"] = float(lowest_Q[number])
            metrics[f"{PREFIX}/{name}_max"] = float(highest_Q[number])
    if per_node:
        metrics |= {
            f"{PREFIX}/node_{node}/{QUANTITIES[number]}": float(means_NQ[node, number])
            for node, number in np.argwhere(known_NQ)
        }
    return metrics


def _gpu_uuids() -> list[str]:
    """Return the UUIDs of the GPUs that the ranks of this machine train on, as NVML takes them."""
    count = min(ranks_of_this_node(), torch.cuda.device_count())
    # A slice of a GPU has a UUID of its own, which torch does not know.
    slices = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.startswith("MIG-")]
    return slices[:count] or [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(count)]
