"""A part of a node that ranks leave to another process: found so that they keep their number and their CPUs."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from resnet_dist.launch.on_ray.placement.fit import Node, Placement, choose_placement


@dataclass(frozen=True)
class Reserved:
    """A part of a node that ranks leave free."""

    node_id: str
    cpus: int
    gpus: int

    def taken_from(self, nodes: Sequence[Node]) -> list[Node]:
        """Return the nodes without this part."""
        return [
            replace(node, cpus=node.cpus - self.cpus, gpus=node.gpus - self.gpus)
            if node.node_id == self.node_id
            else node
            for node in nodes
        ]


def keeps_number(
    part: Reserved, nodes: Sequence[Node], sizes: Sequence[int], cpus: int | None, *, gpu: bool
) -> bool:
    """Report whether as many ranks fit beside this part of a node as without it; the arguments are as of `room_beside`."""
    fits = choose_placement(nodes, sizes, cpus, gpu=gpu)
    beside = choose_placement(part.taken_from(nodes), sizes, cpus, gpu=gpu)
    return fits is None or (beside is not None and beside.workers == fits.workers)


def room_beside(
    nodes: Sequence[Node],
    sizes: Sequence[int],
    cpus: int | None,
    *,
    gpu: bool,
    free: Sequence[Node] | None = None,
) -> Reserved | None:
    """Return what another process can have beside the ranks, which keep their number; None where nothing is left.

    sizes: numbers of ranks, the largest first; none where there are no ranks. free: what of each node nobody uses, where
    ranks run already; None: all of it. A GPU if one is left, else CPUs. Of all places that is the one which leaves the
    ranks the most CPUs, and of these the largest.
    """
    fits = choose_placement(nodes, sizes, cpus, gpu=gpu)
    if sizes and fits is None:
        return None
    # Nodes with the same resources are one choice: a cluster may have hundreds of them.
    kinds: dict[tuple[float, ...], tuple[Node, Node]] = {}
    for node, left in zip(nodes, free or nodes, strict=True):
        kinds.setdefault((node.cpus, node.gpus, left.cpus, left.gpus), (node, left))
    found: list[tuple[int, int, int, Reserved]] = []
    for node, left in kinds.values():
        for gpus in (1, 0) if gpu and left.gpus >= 1 else (0,):
            smallest = Reserved(node.node_id, 1, gpus)
            rest = _cpus_beside(smallest, nodes, fits, cpus, gpu=gpu) if left.cpus >= 1 else 0
            if rest:
                part = _largest(smallest, int(left.cpus), nodes, fits, cpus, gpu=gpu)
                found.append((gpus, rest, part.cpus, part))
    return max(found, key=lambda one: one[:3])[3] if found else None


def _cpus_beside(
    part: Reserved, nodes: Sequence[Node], ranks: Placement | None, cpus: int | None, *, gpu: bool
) -> int:
    """Return the CPUs that each of as many ranks can have beside a part; 0 where they do not fit, 1 without ranks."""
    if ranks is None:
        return 1
    placement = choose_placement(part.taken_from(nodes), [ranks.workers], cpus, gpu=gpu)
    return placement.cpus if placement is not None else 0


def _largest(
    part: Reserved,
    max_cpus: int,
    nodes: Sequence[Node],
    ranks: Placement | None,
    cpus: int | None,
    *,
    gpu: bool,
) -> Reserved:
    """Return the part with as many CPUs, `max_cpus` at most, as leave the ranks what its first one leaves them."""
    wanted = _cpus_beside(part, nodes, ranks, cpus, gpu=gpu)

    def takes_too_much(own: int) -> bool:
        return _cpus_beside(replace(part, cpus=own), nodes, ranks, cpus, gpu=gpu) < wanted

    # Sorted: a larger part never leaves the ranks more.
    num_fitting = bisect_left(range(1, max_cpus + 1), x=True, key=takes_too_much)
    return replace(part, cpus=num_fitting)
