"""The placement of every attempt of a run: chosen among the numbers of ranks it may have, with a wait for room."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from ray.autoscaler.sdk import request_resources

from resnet_dist.config.workers import WorkerRange
from resnet_dist.errors import RankFailed
from resnet_dist.launch.on_ray.placement.fit import Node, Placement, choose_placement, describe, resources_of
from resnet_dist.launch.on_ray.placement.nodes import nodes
from resnet_dist.launch.on_ray.placement.reserved import Reserved, keeps_number

POLL_SECONDS = 1.0  # between two looks at the nodes
REPORT_SECONDS = 60.0  # between two lines while ranks wait for nodes


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
