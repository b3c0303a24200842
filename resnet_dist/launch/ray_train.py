"""Ray Train: start the ranks on the cluster's nodes, show what goes wrong in one as that one's error.

Ray places the processes and sets up the process group. The DDP wrapping, the checkpoints and the metrics are
the loop's, so that a run under Ray is the run of one process with more ranks.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before ray is imported: it reads these once.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Under `uv run` Ray would start every worker through uv again, in a copy of the working folder.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from resnet_dist.config import Recipe
from resnet_dist.errors import RankFailed, TrainingError, UserError
from resnet_dist.launch.attempt import Attempt, RankLauncher
from resnet_dist.launch.rank import collective_timeout_seconds, is_echo, run_attempt
from resnet_dist.runs.folder import RunFolder
from resnet_dist.system.command import DEFAULT_WORKERS
from resnet_dist.system.cpus import cpu_count
from resnet_dist.system.signals import StopRequest, interrupt_second, signals_call
from resnet_dist.train.loop import Outcome
from resnet_dist.world import World

OBJECT_STORE_BYTES = 128 * 2**20  # batches never pass through it
JOIN_SECONDS = 0.2
LONG_START_SECONDS = 60.0  # a start that takes longer is reported


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
    """Connect to a cluster, or start one, for as long as the context lasts; yield what trains `recipe` on it.

    workers: None is DEFAULT_WORKERS, or one on a machine with a single GPU; gpu: None uses GPUs where there are any.
    Raises UserError where there is no cluster, or where it is too small.
    """
    address = address or os.environ.get("RAY_ADDRESS")
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
    """Return the number of ranks for a cluster of this machine alone. Raises UserError where it has too few GPUs."""
    devices = torch.cuda.device_count()
    if workers is None and gpu is None and devices == 1:
        return 1  # the default of two would need a second GPU
    count = workers or DEFAULT_WORKERS
    if gpu and devices < count:
        raise UserError(
            f"--gpu --workers {count}: this machine has {devices} CUDA device(s); use fewer workers, --cpu, or "
            "--address of a cluster"
        )
    return count


@contextmanager
def connected(address: str | None, *, workers: int) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start a local one that ends with the context."""
    try:
        try:
            _connect(address, workers)
        except (ConnectionError, RayError, ValueError, RuntimeError) as error:
            where = f"at {address}" if address else "here"
            raise UserError(f"no Ray cluster {where}: {str(error).splitlines()[0]}") from None
        yield
    finally:
        # A second Ctrl-C ends the wait for Ray; it must not replace the outcome of the run.
        with suppress(KeyboardInterrupt), signals_call(interrupt_second):
            ray.shutdown()


def _connect(address: str | None, workers: int) -> None:
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address=address, **quiet)
        return
    ray.init(
        "local",  # or it would join any cluster that it finds on this machine
        # At least as many CPUs as ranks: a dry run of eight ranks on two cores is slow, not forbidden.
        num_cpus=max(cpu_count(), workers),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        **quiet,
    )


def fit_ranks(
    recipe: Recipe, folder: RunFolder, placement: Placement, report: Callable[[str], None]
) -> Outcome | None:
    """Run one attempt to its end; None where it was interrupted before it could save.

    The first signal asks the ranks for a checkpoint by the run's stop file; a second one, or the end of the grace
    time, gives them up.
    """
    stop, start = StopRequest(), _StartWatch(folder, placement, report)

    def ask(count: int) -> None:
        stop.ask(count)
        folder.stop_file.touch()  # the ranks see it on any node
        if not start.have_begun():
            stop.give_up()  # there is nothing to save

    def give_up() -> bool:
        start.report_if_late()
        return stop.over()

    with signals_call(ask):
        return train_on_ray(
            Attempt.of(recipe, folder, threads=placement.threads),
            folder.path,
            workers=placement.workers,
            gpu=placement.gpu,
            give_up=give_up,
        )


class _StartWatch:
    """Reports once, with the resources that are missing, when no rank has begun after LONG_START_SECONDS."""

    def __init__(self, folder: RunFolder, placement: Placement, report: Callable[[str], None]) -> None:
        self._folder, self._placement, self._report = folder, placement, report
        self._size_before = folder.spool_size()
        self._late_at = time.monotonic() + LONG_START_SECONDS

    def have_begun(self) -> bool:
        return self._folder.spool_size() > self._size_before

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
    """The nodes of the connected cluster that are alive."""
    return [
        Node(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def free_resources() -> str:
    """What nobody in the connected cluster uses, in words."""
    free = ray.available_resources()
    return f"{free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs"


def cpus_per_rank(nodes: Sequence[Node], workers: int, *, gpu: bool) -> int:
    """The most CPUs that each of `workers` ranks can have, whole ranks fitting on nodes.

    Raises UserError where they do not fit: Ray would wait for such resources for ever.
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


def train_on_ray(
    attempt: Attempt, folder: Path, *, workers: int, gpu: bool, give_up: Callable[[], bool]
) -> Outcome | None:
    """Run `workers` ranks to the end; None where `give_up()` came true first.

    Raises RankFailed or TrainingError with the failed rank's words.
    """
    trainer = ray.train.torch.TorchTrainer(
        _rank_main,
        train_loop_config={**asdict(attempt), "gpu": gpu},
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker=_resources(attempt.threads, gpu=gpu)
        ),
        run_config=ray.train.RunConfig(name="ray", storage_path=str(folder)),
        torch_config=ray.train.torch.TorchConfig(
            backend="nccl" if gpu else "gloo", timeout_s=int(collective_timeout_seconds(attempt.recipe))
        ),
    )
    box: list[Any] = []
    # In a thread of its own: in the main thread, fit() would take over SIGINT and leave no time to checkpoint.
    thread = threading.Thread(target=_fit, args=(trainer, box), name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive() and not give_up():
        thread.join(JOIN_SECONDS)
    if not box:
        return None
    if isinstance(box[0], BaseException):
        raise _explain(box[0])
    return Outcome(**box[0])


def _fit(trainer: ray.train.torch.TorchTrainer, box: list[Any]) -> None:
    try:
        box.append(trainer.fit().return_value)
    except BaseException as error:  # raised again in the main thread
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
    assert outcome is not None  # the driver gives up, not a rank
    return asdict(outcome)


def _explain(error: BaseException) -> Exception:
    """The cause in one error: the rank that failed first, not those that lost their peer because of it."""
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        failures = sorted(error.worker_failures.items(), key=lambda item: (is_echo(item[1]), item[0]))
        rank, failure = failures[0]
        cause = _unwrap(failure)
        if isinstance(cause, (TrainingError, UserError)):
            return TrainingError(str(cause))
        return RankFailed(f"rank {rank} failed: {failure}")  # a defect: with the rank's own traceback
    if isinstance(error, ControllerError):
        return RankFailed(f"Ray Train could not run the ranks: {error.controller_failure}")
    return error if isinstance(error, Exception) else RankFailed(repr(error))


def _unwrap(error: BaseException) -> BaseException:
    """Ray wraps what the train function raised; the original is in one of these, by release."""
    for name in ("_base_exc", "cause"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _unwrap(inner)
    return error
