"""Workers on a Ray cluster that each call a function on parts of some work, without knowing of each other.

A worker that is lost is started again by Ray, on whatever node has room, and calls the function again: it must return
the same for the same part, and leave nothing behind. Training has ranks instead, see launcher.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from resnet_dist.launch.on_ray.settings import set_defaults

set_defaults()

import ray
import ray.util
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from resnet_dist.config import WorkerRange
from resnet_dist.errors import ExplainedError, RankFailed, StorageError
from resnet_dist.launch.on_ray.connect import check_gpus_here, connected
from resnet_dist.launch.on_ray.counts import Count, Counts
from resnet_dist.launch.on_ray.launcher import DEFAULT_WAIT_SECONDS
from resnet_dist.launch.on_ray.placement.fit import Placement, cpus_per_rank
from resnet_dist.launch.on_ray.placement.held import free_and_held
from resnet_dist.launch.on_ray.placement.nodes import nodes
from resnet_dist.launch.on_ray.watch import LONG_START_SECONDS
from resnet_dist.launch.ray_cluster.check import find_cluster
from resnet_dist.launch.ray_cluster.packages import check_packages

MAX_RESTARTS = 3  # of one worker
POLL_SECONDS = 0.5

Part = TypeVar("Part")


class Worker:
    """The actor of one worker."""

    def ready(self) -> str:
        """Return the node's address, when this process has started."""
        return str(ray.util.get_node_ip_address())

    def call(
        self, function: Callable[..., Any], job: Any, part: Any, cpus: int, count: Count | None = None
    ) -> Any:
        """Call the function in this process. count: its fourth argument; None: it gets three."""
        import torch  # Here: Ray's processes start without it.

        torch.set_num_threads(cpus)
        try:
            return function(job, part, cpus, *([] if count is None else [count]))
        except StorageError as error:  # What one node lacks is mended on that node.
            raise StorageError(f"worker on {ray.util.get_node_ip_address()}: {error}") from None


class Pool:
    """Workers that are placed and ready."""

    def __init__(self, actors: Sequence[Any], cpus: int, *, gpu: bool) -> None:
        self.size, self.cpus, self.gpu = len(actors), cpus, gpu
        self._actors = actors

    def map(
        self,
        function: Callable[..., Any],
        job: Any,
        parts: Sequence[Part],
        show: Callable[[int], None] | None = None,
    ) -> list[Any]:
        """Return `function(job, part, cpus)` for each part, in their order; at most one part for each worker.

        show: gets the sum of what the functions count; each is then called with a fourth argument, a function that takes
        its count so far. Raises an ExplainedError that the function raises, and RankFailed where a worker is lost again
        and again.
        """
        shared, counts = ray.put(job), Counts(len(self._actors))
        calls = [
            actor.call.remote(function, shared, part, self.cpus, None if show is None else count)
            for actor, part, count in zip(self._actors, parts, counts.of_workers, strict=False)
        ]
        left = list(calls)
        try:
            while left:
                done, left = ray.wait(left, timeout=POLL_SECONDS)
                for call in done:
                    _result(call)  # The first failure ends all.
                if show is not None:
                    show(counts.total())
        finally:
            if show is not None:
                counts.close()
        return [_result(call) for call in calls]


@contextmanager
def connected_for(
    workers: int, *, gpu: bool | None, address: str | None, report: Callable[[str], None]
) -> Iterator[Placement]:
    """Connect to a cluster, or start one; yield the CPUs and GPUs that each of `workers` workers can have on it.

    gpu: None uses GPUs where there are any. Raises UserError where the cluster is too small.
    """
    address = find_cluster(address)
    if address is None:
        report("starting Ray on this machine")
        check_gpus_here(WorkerRange.exactly(workers), gpu=gpu)
    with connected(address, workers=workers, report=report):
        if address is not None:
            check_packages(report)
        alive = nodes()
        use_gpu = sum(node.gpus for node in alive) > 0 if gpu is None else gpu
        yield Placement(workers, cpus_per_rank(alive, workers, gpu=use_gpu), use_gpu)


@contextmanager
def worker_pool(
    workers: int, *, gpu: bool | None, address: str | None, report: Callable[[str], None]
) -> Iterator[Pool]:
    """Connect to a cluster, or start one, and yield `workers` workers on it, with the CPUs divided among them.

    Raises as `connected_for`, and RankFailed where other jobs leave it no room for DEFAULT_WAIT_SECONDS.
    """
    with connected_for(workers, gpu=gpu, address=address, report=report) as placement:
        options = {"num_cpus": placement.cpus, "num_gpus": int(placement.gpu), "max_restarts": MAX_RESTARTS}
        made = ray.remote(Worker).options(**options, max_task_retries=MAX_RESTARTS)
        actors = [made.remote() for _ in range(workers)]
        _wait_until_ready(actors, placement, report)
        yield Pool(actors, placement.cpus, gpu=placement.gpu)


def _wait_until_ready(actors: Sequence[Any], placement: Placement, report: Callable[[str], None]) -> None:
    """Wait until all workers have started. Raises RankFailed where they have not in time, for want of room."""
    left, begun_at, is_reported = [actor.ready.remote() for actor in actors], time.monotonic(), False
    while left:
        done, left = ray.wait(left, num_returns=len(left), timeout=POLL_SECONDS)
        for call in done:
            _result(call)
        waited = time.monotonic() - begun_at
        if left and waited >= DEFAULT_WAIT_SECONDS:
            raise RankFailed(
                f"{len(left)} of {len(actors)} workers, with {placement} each, have not started in {waited:.0f} s; "
                f"{free_and_held()}"
            )
        if left and waited >= LONG_START_SECONDS and not is_reported:
            is_reported = True
            report(
                f"waiting for workers, {DEFAULT_WAIT_SECONDS:.0f} s at most: {len(left)} of {len(actors)}, with {placement} "
                f"each, have not started; {free_and_held()}"
            )


def _result(call: Any) -> Any:
    try:
        return ray.get(call)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ExplainedError):
            raise cause from None
        raise RankFailed(f"a worker failed: {type(cause).__name__}: {cause}", str(error)) from None
    except (RayActorError, OutOfMemoryError) as error:
        raise RankFailed(
            f"a worker was lost more than {MAX_RESTARTS} times: {str(error).splitlines()[0]}", str(error)
        ) from None
    except RayError as error:
        raise RankFailed(f"a worker cannot be reached: {str(error).splitlines()[0]}", str(error)) from None
