"""The placement that fits on some nodes, by arithmetic alone: how many ranks, with how many CPUs each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resnet_dist.errors import UserError

MAX_SHOWN = 8  # nodes in a sentence


@dataclass(frozen=True)
class Node:
    """The CPUs, GPUs and memory of one node that is alive and stays."""

    cpus: float
    gpus: float
    host: str = ""
    node_id: str = ""
    memory: float = math.inf  # bytes that Ray may use


@dataclass(frozen=True)
class Placement:
    """The resources of an attempt: `workers` ranks with `cpus` CPUs each, and a GPU each or none."""

    workers: int
    cpus: int
    gpu: bool

    def __str__(self) -> str:
        return f"{self.cpus} CPU(s){' and a GPU' if self.gpu else ''}"


def cpus_per_rank(nodes: Sequence[Node], workers: int, *, gpu: bool) -> int:
    """Return the largest number of CPUs that each of `workers` ranks can have, with no rank split over nodes.

    Raises UserError where the ranks do not fit: Ray would wait for the missing resources forever.
    """
    for cpus in range(int(max((node.cpus for node in nodes), default=0)), 0, -1):
        if capacity(nodes, cpus, gpu=gpu) >= workers:
            return cpus
    have = f"{sum(node.cpus for node in nodes):g} CPUs and {sum(node.gpus for node in nodes):g} GPUs"
    need = "one CPU and one GPU" if gpu else "one CPU"
    possible = capacity(nodes, 1, gpu=gpu)
    hint = f"use --workers {possible} or fewer" if possible else "use --cpu" if gpu else "add a node"
    raise UserError(
        f"--workers {workers}: each needs {need}, but the Ray cluster has {have} on {len(nodes)} node(s); {hint}"
    )


def capacity(nodes: Iterable[Node], cpus: int, *, gpu: bool) -> int:
    """Return the number of ranks with `cpus` CPUs each, and a GPU each or none, that fit on the nodes."""
    return sum(
        min(int(node.cpus // cpus), int(node.gpus)) if gpu else int(node.cpus // cpus) for node in nodes
    )


def choose_placement(
    nodes: Sequence[Node], sizes: Sequence[int], cpus: int | None, *, gpu: bool
) -> Placement | None:
    """Return the placement with the first of `sizes` that fits, or None where none does.

    cpus: of a rank, as the run began with; ranks get fewer where so many do not fit. None: as many as fit.
    """
    for size in sizes:
        if capacity(nodes, 1, gpu=gpu) >= size:
            most = cpus_per_rank(nodes, size, gpu=gpu)
            return Placement(size, min(most, cpus or most), gpu)
    return None


def resources_of(placement: Placement) -> dict[str, float]:
    """Return the resources of one rank, in Ray's names."""
    return {"CPU": placement.cpus, "GPU": 1} if placement.gpu else {"CPU": placement.cpus}


def describe(nodes: Sequence[Node]) -> str:
    """Return the nodes in words, such as "h1 has 2 CPUs and 0 GPUs"."""
    if not nodes:
        return "the cluster has no node for ranks"
    shown = [f"{node.host or 'a node'} has {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes]
    more = len(shown) - MAX_SHOWN
    return ", ".join([*shown[:MAX_SHOWN], *([f"and {more} more nodes"] if more > 0 else [])])
