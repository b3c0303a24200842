"""Ray Train: start the ranks on a cluster, and report a failure as the error of the rank that failed first.

Ray places the processes and sets up the process group. DDP, checkpoints and metrics belong to the loop, so a
run under Ray computes what the other launchers compute.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resnet_dist.launch.ray_settings import ADDRESS_VARIABLE, set_defaults

set_defaults()

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from resnet_dist.config import Recipe
from resnet_dist.errors import RankFailed, StorageError, TrainingError, UserError
from resnet_dist.launch.attempt import Attempt, RankLauncher
from resnet_dist.launch.rank import collective_timeout_seconds, is_echo, run_attempt
from resnet_dist.runs.folder import RunFolder
from resnet_dist.system.command import DEFAULT_WORKERS
from resnet_dist.system.cpus import cpu_count
from resnet_dist.system.signals import StopRequest, handle_signals, raise_on_second
from resnet_dist.train.loop import Outcome
from resnet_dist.world import World

# Keep Ray's object store small: batches never pass through it.
OBJECT_STORE_BYTES = 128 * 2**20
JOIN_SECONDS = 0.2
LONG_START_SECONDS = 60.0  # A start that takes longer is reported.


@dataclass(frozen=True)
class Node:
    """The CPUs and GPUs of one node of the cluster."""

    cpus: float
    gpus: float


@dataclass(frozen=True)
class Placement:
    """The resources of an attempt: `workers` ranks with `threads` CPUs each, and a GPU each or none."""

    workers: int
    threads: int
    gpu: bool


@contextmanager
def ray_launcher(
    recipe: Recipe,
    *,
    workers: int | None,
    gpu: bool | None,
    address: str | None,
    report: Callable[[str], None],
) -> Iterator[RankLauncher]:
    """Connect to a cluster, or start one, for as long as the context lasts; yield a launcher that uses it.

    workers: None is DEFAULT_WORKERS, or one on a machine with a single GPU; gpu: None uses GPUs where there
    are any. Raises UserError where there is no cluster, or where it is too small.
    """
    # An empty variable counts as none.
    address = address or os.environ.get(ADDRESS_VARIABLE) or None
    count = workers or DEFAULT_WORKERS
    if address is None:
        report("starting Ray on this machine")
        count = workers_here(workers, gpu=gpu)
    with connected(address, workers=count):
        alive = nodes()
        use_gpu = sum(node.gpus for node in alive) > 0 if gpu is None else gpu
        placement = Placement(count, cpus_per_rank(alive, count, gpu=use_gpu), use_gpu)
        yield lambda folder: fit_ranks(recipe, folder, placement, report)


def workers_here(workers: int | None, *, gpu: bool | None) -> int:
    """Return the number of ranks for a cluster of this machine alone.

    Raises UserError where it has too few GPUs.
    """
    devices = torch.cuda.device_count()
    if workers is None and gpu is None and devices == 1:
        return 1  # DEFAULT_WORKERS would need a second GPU.
    count = workers or DEFAULT_WORKERS
    if gpu and devices < count:
        raise UserError(
            f"--gpu --workers {count}: this machine has {devices} CUDA device(s); use fewer workers, --cpu, or "
            "--address of a cluster"
        )
    return count


@contextmanager
def connected(address: str | None, *, workers: int) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start a local one that ends with the context.

    Raises UserError where Ray cannot connect or start.
    """
    try:
        try:
            _connect(address, workers)
        except (ConnectionError, RayError, ValueError, RuntimeError) as error:
            where = f"at {address}" if address else "here"
            raise UserError(f"no Ray cluster {where}: {str(error).splitlines()[0]}") from None
        yield
    finally:
        # A second signal ends the wait for Ray, but must not replace the outcome of the run.
        with suppress(KeyboardInterrupt), handle_signals(raise_on_second):
            ray.shutdown()


def _connect(address: str | None, workers: int) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address=address, **quiet)
        return
    ray.init(
        "local",  # Without this, Ray joins any cluster that it finds on this machine.
        # Offer as many CPUs as ranks: a trial of eight ranks on two cores is slow, but allowed.
        num_cpus=max(cpu_count(), workers),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )


def fit_ranks(
    recipe: Recipe, folder: RunFolder, placement: Placement, report: Callable[[str], None]
) -> Outcome | None:
    """Run one attempt to its end; return None where it was interrupted before it could save.

    The first signal requests a checkpoint by the run's stop file; a second one, or the end of the grace time,
    gives the ranks up.
    """
    stop, start = StopRequest(), _StartWatch(folder, placement, report)

    def request_stop(count: int) -> None:
        stop.request(count)
        # A signal does not reach other nodes; the run's storage is seen by all. Its answer may take long.
        threading.Thread(target=request_stop_of, args=(folder, report), name="stop", daemon=True).start()
        if not start.have_begun():
            stop.give_up()  # There is nothing to save.

    def give_up() -> bool:
        start.report_if_late()
        return stop.expired()

    with handle_signals(request_stop):
        return train_on_ray(
            Attempt.of(recipe, folder, threads=placement.threads),
            workers=placement.workers,
            gpu=placement.gpu,
            give_up=give_up,
        )


def request_stop_of(folder: RunFolder, report: Callable[[str], None]) -> None:
    """Request a stop of the ranks through the storage of their run; report where it cannot be written."""
    try:
        folder.request_stop()
    except StorageError as error:
        report(f"the ranks could not be asked to save: {error}")


class _StartWatch:
    """Reports once, with the resources that ranks wait for, where none has begun after LONG_START_SECONDS."""

    def __init__(self, folder: RunFolder, placement: Placement, report: Callable[[str], None]) -> None:
        self._folder, self._placement, self._report = folder, placement, report
        self._end_before = folder.spool.end()
        self._late_at = time.monotonic() + LONG_START_SECONDS

    def have_begun(self) -> bool:
        try:
            return self._folder.spool.end() != self._end_before
        except StorageError:  # It is not known: give the ranks time to save.
            return True

    def report_if_late(self) -> None:
        if time.monotonic() <= self._late_at:
            return
        self._late_at = math.inf
        if not self.have_begun():
            need = f"{self._placement.threads} CPU(s){' and a GPU' if self._placement.gpu else ''}"
            self._report(
                f"no rank has begun after {LONG_START_SECONDS:g} s: {self._placement.workers} wait for {need} each; "
                f"{free_resources()} are free in the cluster"
            )


def nodes() -> list[Node]:
    """Return the nodes of the connected cluster that are alive."""
    return [
        Node(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_resources() -> str:
    """Describe the CPUs and GPUs of the connected cluster that are not in use."""
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


def cpus_per_rank(nodes: Sequence[Node], workers: int, *, gpu: bool) -> int:
    """Return the largest number of CPUs that each of `workers` ranks can have, with no rank split over nodes.

    Raises UserError where the ranks do not fit: Ray would wait for the missing resources forever.
    """
    for cpus in range(int(max((node.cpus for node in nodes), default=0)), 0, -1):
        if sum(_ranks_on(node, cpus, gpu=gpu) for node in nodes) >= workers:
            return cpus
    have = f"{sum(node.cpus for node in nodes):g} CPUs and {sum(node.gpus for node in nodes):g} GPUs"
    need = "one CPU and one GPU" if gpu else "one CPU"
    possible = sum(_ranks_on(node, 1, gpu=gpu) for node in nodes)
    hint = f"use --workers {possible} or fewer" if possible else "use --cpu" if gpu else "add a node"
    raise UserError(
        f"--workers {workers}: each needs {need}, but the Ray cluster has {have} on {len(nodes)} node(s); {hint}"
    )


def _ranks_on(node: Node, cpus: int, *, gpu: bool) -> int:
    by_cpu = int(node.cpus // cpus)
    return min(by_cpu, int(node.gpus)) if gpu else by_cpu


def train_on_ray(attempt: Attempt, *, workers: int, gpu: bool, give_up: Callable[[], bool]) -> Outcome | None:
    """Run `workers` ranks to their end; return None where `give_up()` returned true first.

    Raises RankFailed or TrainingError with the message of the rank that failed.
    """
    # A path that every node has: Ray Train's controller may run on another one.
    ray_files = Path(tempfile.gettempdir()) / f"resnet-dist-{os.getuid()}" / "ray"
    trainer = ray.train.torch.TorchTrainer(
        _rank_main,
        train_loop_config={**asdict(attempt), "gpu": gpu},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker=_resources(attempt.threads, gpu=gpu)
        ),
        # Ray Train writes a few small files of its own, which nothing else reads.
        run_config=ray.train.RunConfig(name=attempt.token, storage_path=str(ray_files)),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if gpu else "gloo", timeout_s=int(collective_timeout_seconds(attempt.recipe))
        ),
    )
    box: list[Any] = []
    # In the main thread, fit() would replace the handler of SIGINT and leave no time for a checkpoint.
    thread = threading.Thread(target=_fit, args=(trainer, box), name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive() and not give_up():
        thread.join(JOIN_SECONDS)
    shutil.rmtree(ray_files / attempt.token, ignore_errors=True)
    if not box:
        return None
    if isinstance(box[0], BaseException):
        raise _explain(box[0])
    return Outcome(**box[0])


def _fit(trainer: ray.train.torch.TorchTrainer, box: list[Any]) -> None:
    try:
        box.append(trainer.fit().return_value)
    except BaseException as error:  # `train_on_ray` raises it again in the main thread.
        box.append(error)


def _resources(cpus: int, *, gpu: bool) -> dict[str, float]:
    return {"CPU": cpus, "GPU": 1} if gpu else {"CPU": cpus}


def _rank_main(config: dict[str, Any]) -> dict[str, Any]:
    gpu = config.pop("gpu")
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    world = World.from_process_group(local_rank=context.get_local_rank(), device=device)
    assert (device.type == "cuda") == gpu
    outcome = run_attempt(Attempt(**config), world)
    assert outcome is not None  # Only the driver gives up; a rank has no `give_up`.
    return asdict(outcome)


def _explain(error: BaseException) -> Exception:
    """Return the error of the rank that failed first, not of the ranks that lost it as their peer."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        failures = sorted(error.worker_failures.items(), key=lambda item: (is_echo(item[1]), item[0]))
        rank, failure = failures[0]
        cause = _unwrap(failure)
        if isinstance(cause, (TrainingError, UserError)):
            return TrainingError(str(cause))
        return RankFailed(f"rank {rank} failed: {failure}")  # It is a defect: include the rank's traceback.
    if isinstance(error, ControllerError):
        return RankFailed(f"Ray Train could not run the ranks: {error.controller_failure}")
    return error if isinstance(error, Exception) else RankFailed(repr(error))


def _unwrap(error: BaseException) -> BaseException:
    """Return what the train function raised; each release of Ray keeps it in one of these attributes."""
    for name in ("_base_exc", "cause"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _unwrap(inner)
    return error
