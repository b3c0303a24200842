"""Map a function over many items on a Ray cluster, in their order, by Ray Data and its pool of actors.

Ray Data starts an actor again that is lost, and gives its batches to others; items that have a result are not computed
again. Items and results are plain values, which are pickled.
"""

from __future__ import annotations

import logging
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from resnet_dist.launch.on_ray.settings import set_defaults

set_defaults()

import numpy as np
import ray
import ray.cloudpickle
import ray.data
from ray._private.state import state as cluster_state
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayTaskError

from resnet_dist.errors import ExplainedError, RankFailed
from resnet_dist.launch.on_ray.placement.fit import Placement
from resnet_dist.launch.on_ray.placement.held import free_and_held
from resnet_dist.launch.on_ray.watch import LONG_START_SECONDS

WINDOW = 200_000  # items that are given to Ray Data at once
WAIT_SECONDS = 600.0  # without an actor that runs
LOOK_SECONDS = 5.0  # between two looks at the actors
POOL_CLASS = "MapWorker"  # with which Ray Data's names of its actors begin
POLL_SECONDS = 0.2
ITEM, RESULT = "item", "result"  # columns
AHEAD = 4  # batches of results that wait for their reader

Function = Callable[[Sequence[Any]], Sequence[Any]]  # items → one result each, in the same order


class _Mapper:
    """The actor's callable: it makes the function once, and applies it to batches."""

    def __init__(self, make: Callable[..., Function], shared: Any, cpus: int) -> None:
        import torch  # Here: Ray's processes start without it.

        torch.set_num_threads(cpus)
        self._function = make(*(ray.get(shared) if isinstance(shared, ray.ObjectRef) else shared))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = self._function([pickle.loads(item) for item in batch[ITEM]])
        return {RESULT: np.array([pickle.dumps(result) for result in results], dtype=object)}


def mapped(
    make: Callable[..., Function],
    arguments: tuple[Any, ...],
    items: Iterable[Any],
    *,
    batch_size: int,
    placement: Placement,
    report: Callable[[str], None],
) -> Iterator[list[Any]]:
    """Yield the results of all items in their order, some at a time. The cluster must be connected.

    make: called in each actor with `arguments`, which are sent once; it returns the function. placement: the actors.
    Raises an ExplainedError of the function, RankFailed where the function failed or there is no
    room for WAIT_SECONDS.
    """
    _quiet()
    shared, items = ray.put(arguments), iter(items)
    while window := list(islice(items, WINDOW)):
        blocks = max(1, -(-len(window) // batch_size))
        rows = [{ITEM: ray.cloudpickle.dumps(item)} for item in window]
        results = ray.data.from_items(rows, override_num_blocks=min(blocks, len(rows))).map_batches(
            _Mapper,
            fn_constructor_args=(make, shared, placement.cpus),
            batch_size=batch_size,
            compute=ActorPoolStrategy(size=min(placement.workers, blocks)),
            num_cpus=placement.cpus,
            num_gpus=1 if placement.gpu else 0,
        )
        yield from _in_time(results, report)


def _in_time(results: Any, report: Callable[[str], None]) -> Iterator[list[Any]]:
    """Yield results as they come; a thread waits for them, so that this one sees when none do."""
    found: queue.Queue[Any] = queue.Queue(AHEAD)
    closed = threading.Event()

    def put(value: Any) -> bool:
        while not closed.is_set():
            try:
                found.put(value, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for batch in results.iter_batches(batch_size=None, batch_format="numpy"):
                if not put([pickle.loads(result) for result in batch[RESULT]]):
                    return
            put(None)
        except BaseException as error:  # The reader raises it again.
            put(error)

    threading.Thread(target=read, name="results", daemon=True).start()
    try:
        while (value := _next(found, report)) is not None:
            if isinstance(value, BaseException):
                raise explained(value) from None
            yield value
    finally:
        closed.set()


def _next(found: queue.Queue[Any], report: Callable[[str], None]) -> Any:
    """Return the next result. Raises RankFailed once no actor has run for WAIT_SECONDS: one that is slow may take longer."""
    begun_at = looked_at = idle_since = time.monotonic()
    is_reported = False
    while True:
        try:
            return found.get(timeout=POLL_SECONDS)
        except queue.Empty:
            now = time.monotonic()
        if now - looked_at >= LOOK_SECONDS:
            looked_at = now
            idle_since = now if _is_running() else idle_since
        if now - idle_since >= WAIT_SECONDS:
            raise RankFailed(f"no worker has run for {now - idle_since:.0f} s; {free_and_held()}")
        if now - begun_at >= LONG_START_SECONDS and not is_reported:
            is_reported = True
            report(f"no result for {now - begun_at:.0f} s; {free_and_held()}")


def _is_running() -> bool:
    """Report whether an actor of this program's pool has been made and lives; False where Ray does not answer."""
    try:
        alive = cluster_state.actor_table(None, None, "ALIVE").values()
        job = ray.get_runtime_context().get_job_id()
    except Exception:  # Ray has errors of many classes, and each is a missing answer.
        return False
    return any(one["JobID"] == job and one["ActorClassName"].startswith(POOL_CLASS) for one in alive)


def explained(error: BaseException) -> Exception:
    """Return the error of the function as it was raised there, or as a RankFailed."""
    cause: BaseException | None = error
    while cause is not None:
        inner = cause.cause if isinstance(cause, RayTaskError) else None
        if isinstance(cause, ExplainedError):
            return cause
        cause = inner if isinstance(inner, BaseException) else cause.__cause__
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return RankFailed(f"a worker failed: {first}", str(error))


def _quiet() -> None:
    """Keep Ray Data's bars and notes from the person, and its results in order."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.ERROR)
