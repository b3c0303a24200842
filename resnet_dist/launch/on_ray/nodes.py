"""The nodes of a Ray cluster: where ranks fit, how to wait for room, and which change is worth a new start."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import ray
import ray.util
from ray._private.state import state as cluster_state
from ray.autoscaler.sdk import request_resources

from resnet_dist.config.workers import WorkerRange
from resnet_dist.errors import RankFailed, UserError

POLL_SECONDS = 1.0  # between two looks at the nodes
REPORT_SECONDS = 60.0  # between two lines while ranks wait for nodes
# A larger number of ranks must fit for so long before it is used: nodes often join in groups.
SETTLING_SECONDS = 30.0


@dataclass(frozen=True)
class Node:
    """The CPUs and GPUs of one node that is alive and stays."""

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


def free_resources() -> str:
    """Describe the CPUs and GPUs of the connected cluster that are not in use."""
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


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


class Placer:
    """Chooses the placement of every attempt of a run, and waits where the cluster has no room."""

    def __init__(
        self,
        workers: WorkerRange,
        sizes: Sequence[int],
        *,
        gpu: bool,
        wait_seconds: float,
        report: Callable[[str], None],
    ) -> None:
        """Prepare to place ranks in the numbers `sizes`, the largest first.

        wait_seconds: limit for a wait for nodes, after which fewer ranks are used than preferred, or the run ends.
        """
        # The part of a node that another process has; `place` drops it where ranks need it to keep their number.
        self.reserved: Reserved | None = None
        self.sizes, self.gpu = sizes, gpu
        self._workers = workers
        self._wait_seconds = wait_seconds
        self._report = report

    def place(self, cpus: int | None, since: float, give_up: Callable[[], bool]) -> Placement | None:
        """Return the next placement; None where `give_up()` returned true first.

        Waits for the preferred number of ranks, then uses what fits. since: the monotonic time at which the wait began.
        Raises RankFailed where nothing fits in time.
        """
        preferred = [size for size in self.sizes if size >= self._workers.preferred]
        need = Placement(self._workers.preferred, cpus or 1, self.gpu)
        report_at = -math.inf
        try:
            while not give_up():
                waited, alive = time.monotonic() - since, nodes()
                late = self.is_late(since)
                sizes = self.sizes if late else preferred
                if self.reserved is not None:
                    if not keeps_number(self.reserved, alive, sizes, cpus, gpu=self.gpu):
                        self.reserved = None
                        continue
                    alive = self.reserved.taken_from(alive)
                if placement := choose_placement(alive, sizes, cpus, gpu=self.gpu):
                    return placement
                if late:
                    raise RankFailed(
                        f"no room for {need.workers} rank(s) with {need} each after {self._wait_seconds:g} s (--wait): "
                        f"{describe(alive)}"
                    )
                if waited >= report_at:
                    report_at = waited + REPORT_SECONDS
                    self._wait_for(need, alive, self._wait_seconds - waited)
                time.sleep(POLL_SECONDS)
            return None
        finally:
            if report_at > 0:
                request_resources(bundles=[])

    def is_late(self, since: float) -> bool:
        return time.monotonic() - since >= self._wait_seconds

    def _wait_for(self, need: Placement, alive: Sequence[Node], seconds: float) -> None:
        """Report a wait, and request the nodes: an autoscaler adds them only for a demand that it knows."""
        self._report(
            f"waiting for nodes, {seconds:.0f} s at most: {need.workers} rank(s) need {need} each; {describe(alive)}"
        )
        request_resources(bundles=[resources_of(need)] * need.workers)


def resources_of(placement: Placement) -> dict[str, float]:
    """Return the resources of one rank, in Ray's names."""
    return {"CPU": placement.cpus, "GPU": 1} if placement.gpu else {"CPU": placement.cpus}


def describe(nodes: Sequence[Node]) -> str:
    """Return the nodes in words, such as "h1 has 2 CPUs and 0 GPUs"."""
    if not nodes:
        return "the cluster has no node for ranks"
    return ", ".join(
        f"{node.host or 'a node'} has {node.cpus:g} CPUs and {node.gpus:g} GPUs" for node in nodes
    )


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
        """Return the reason to start the ranks anew, or None; at most every POLL_SECONDS it asks the cluster."""
        now = self._clock()
        if now < self._look_at:
            return None
        self._look_at = now + POLL_SECONDS
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
