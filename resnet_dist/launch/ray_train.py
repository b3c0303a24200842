"""Ray Train: start the ranks on a cluster, and report a failure as the error of the rank that failed first.

Ray places and starts the processes; the ranks set up the process group. DDP, checkpoints and metrics belong to the
loop, so a run under Ray computes what the other launchers compute. Each attempt is one `fit()`: Ray Train could retry by
itself, but it would retry a person's mistake too, and use numbers of ranks that the recipe does not allow.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

from resnet_dist.launch.ray_settings import ignored_variables, set_defaults

set_defaults()

import ray
import ray.train
import torch
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.errors import RankFailed, StorageError, UserError
from resnet_dist.launch.attempt import Attempt, ClusterChanged, RankLauncher
from resnet_dist.launch.preload.client import is_on
from resnet_dist.launch.ray_cluster.check import find_cluster
from resnet_dist.launch.ray_cluster.packages import check_packages
from resnet_dist.launch.ray_failures import NotPlaced, explain
from resnet_dist.launch.ray_nodes import (
    ClusterWatch,
    Placement,
    Placer,
    choose_placement,
    cpus_per_rank,
    free_resources,
    nodes,
    resources_of,
)
from resnet_dist.launch.ray_worker import MeetingConfig, rank_main
from resnet_dist.launch.start_times import PLACED
from resnet_dist.runs.folder import RunFolder
from resnet_dist.search_path import hiding_file, neutral_folder
from resnet_dist.system.cpus import cpu_count
from resnet_dist.system.environment.explain import limit_behind
from resnet_dist.system.environment.limits import shared_memory
from resnet_dist.system.signals import (
    IGNORABLE_SIGNALS,
    StopRequest,
    handle_signals,
    kept_from_children,
    raise_on_second,
)
from resnet_dist.train.loop import Outcome
from resnet_dist.train.watch.progress import collective_timeout_seconds

# Keep Ray's object store small: batches never pass through it.
OBJECT_STORE_BYTES = 128 * 2**20
JOIN_SECONDS = 0.2
LONG_START_SECONDS = 60.0  # A start that takes longer is reported.
DEFAULT_WAIT_SECONDS = 600.0  # for nodes


@contextmanager
def ray_launcher(
    recipe: Recipe,
    *,
    workers: WorkerRange,
    gpu: bool | None,
    address: str | None,
    wait_seconds: float | None,
    report: Callable[[str], None],
) -> Iterator[RankLauncher]:
    """Connect to a cluster, or start one, for as long as the context lasts; yield a launcher that uses it.

    gpu: None uses GPUs where there are any. wait_seconds: limit for a wait for nodes; None refuses a cluster that is
    too small now, and waits DEFAULT_WAIT_SECONDS where a node is lost later. Raises UserError where there is no
    cluster, or where it is too small.
    """
    # Again, because preparing the data may have taken long: Ray would wait for a cluster that has gone by now.
    address = find_cluster(address)
    for variable in ignored_variables():
        report(f"ignored: {variable}: training needs version 2 of Ray Train")
    if address is None:
        report("starting Ray on this machine")
        check_gpus_here(workers, gpu=gpu)
    with connected(address, workers=workers.max, report=report):
        if address is not None:
            check_packages(report)
        alive, sizes = nodes(), workers.sizes(recipe)
        use_gpu = sum(node.gpus for node in alive) > 0 if gpu is None else gpu
        preferred = [size for size in sizes if size >= workers.preferred]
        if wait_seconds is None and not choose_placement(alive, preferred, None, gpu=use_gpu):
            cpus_per_rank(
                alive, preferred[-1], gpu=use_gpu
            )  # Raises the UserError that names what is missing.
        limit = DEFAULT_WAIT_SECONDS if wait_seconds is None else wait_seconds
        placer = Placer(workers, sizes, gpu=use_gpu, wait_seconds=limit, report=report)
        yield lambda folder: fit_ranks(recipe, folder, placer, report)


def check_gpus_here(workers: WorkerRange, *, gpu: bool | None) -> None:
    """Raise UserError where this machine, as a cluster of its own, has too few GPUs."""
    devices = torch.cuda.device_count()
    if gpu and devices < workers.preferred:
        raise UserError(
            f"--gpu --workers {workers}: this machine has {devices} CUDA device(s); use fewer workers, --cpu, or "
            "--address of a cluster"
        )


@contextmanager
def connected(
    address: str | None, *, workers: int, report: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Connect to the Ray cluster at `address`, or start a local one that ends with the context.

    report: receives what a person should know about a local one.

    Raises UserError where Ray cannot connect or start.
    """
    if (hiding := hiding_file()) is not None:
        raise UserError(f"{hiding}: has the name of a library, which no rank could import; rename it")
    try:
        try:
            # Ray passes both on to its processes: a file of the working folder may hide a library, and a terminal
            # that goes away would end them at once, before a checkpoint.
            with neutral_folder(), kept_from_children(*IGNORABLE_SIGNALS):
                _connect(address, workers, report)
        # Ray raises bare Exceptions and OSErrors too; none of them is a defect of ours.
        except Exception as error:
            where = f"at {address}" if address else "here"
            cause = limit_behind(error) or " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"no Ray cluster {where}: {cause}") from None
        yield
    finally:
        # A second signal ends the wait for Ray, but must not replace the outcome of the run.
        with suppress(KeyboardInterrupt), handle_signals(raise_on_second):
            ray.shutdown()


def _connect(address: str | None, workers: int, report: Callable[[str], None]) -> None:
    # Ray prints every death of a worker, whatever its log settings; `explain` names it in one sentence.
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix: None
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address:
        ray.init(address=address, **quiet)
        return
    plasma, lines = shared_memory()
    for line in lines:
        report(line)
    ray.init(
        "local",  # Without this, Ray joins any cluster that it finds on this machine.
        # Offer as many CPUs as ranks: a trial of eight ranks on two cores is slow, but allowed.
        num_cpus=max(cpu_count(), workers),
        # Ray counts the entries of CUDA_VISIBLE_DEVICES, also those that torch cannot use.
        num_gpus=torch.cuda.device_count(),
        object_store_memory=OBJECT_STORE_BYTES,
        include_dashboard=False,
        _plasma_directory=str(plasma) if plasma else None,
        **quiet,
    )


def fit_ranks(
    recipe: Recipe, folder: RunFolder, placer: Placer, report: Callable[[str], None]
) -> Outcome | None:
    """Run one attempt to its end; return None where it was interrupted before it could save.

    The first signal requests a checkpoint by the run's stop file; a second one, or the end of the grace time,
    gives the ranks up. Raises ClusterChanged where the ranks have saved because the cluster changed.
    """
    stop, since, before = StopRequest(), time.monotonic(), folder.ranks()
    report_at = 0.0
    while True:
        with handle_signals(lambda count: stop.give_up()):
            placement = placer.place((before.cpus or before.threads) if before else None, since, stop.expired)
        if placement is None:
            return None
        try:
            return _fit_placed(recipe, folder, placement, placer.sizes, stop, report)
        except NotPlaced:  # Other jobs, or a node that has just gone, hold the resources.
            if placer.is_late(since):
                raise RankFailed(
                    f"the cluster had no room for {placement.workers} rank(s) with {placement} each in time (--wait); "
                    f"{free_resources()} are free"
                ) from None
            if time.monotonic() >= report_at:
                report_at = time.monotonic() + LONG_START_SECONDS
                report(
                    f"waiting for room: {placement.workers} rank(s) need {placement} each, {free_resources()} are free, other "
                    "jobs use the rest"
                )


def _fit_placed(
    recipe: Recipe,
    folder: RunFolder,
    placement: Placement,
    sizes: Sequence[int],
    stop: StopRequest,
    report: Callable[[str], None],
) -> Outcome | None:
    start, change = _StartWatch(folder, placement, report), _Change(folder, placement, sizes, report)

    def request_stop(count: int) -> None:
        stop.request(count)
        if folder.is_lost:  # The stop file would be the new driver's.
            stop.give_up()
            return
        # A signal does not reach other nodes; the run's storage is seen by all. Its answer may take long.
        threading.Thread(target=request_stop_of, args=(folder, report), name="stop", daemon=True).start()
        if not start.have_begun():
            stop.give_up()  # There is nothing to save.

    def give_up() -> bool:
        start.report_if_late()
        if start.have_begun() and not stop.requested():
            change.look()
        return stop.expired()

    with handle_signals(request_stop):
        attempt = Attempt.of(recipe, folder, cpus=placement.cpus, marks={PLACED: time.time()})
        outcome = train_on_ray(attempt, placement, give_up)
    if change.reason and not stop.requested() and outcome is not None and not outcome.finished:
        raise ClusterChanged(
            f"{change.reason}; the ranks saved step {outcome.step} and start again", change.seen_at
        )
    return outcome


class _Change:
    """Requests a checkpoint and the end of the ranks where the cluster changes so that they should start again."""

    def __init__(
        self, folder: RunFolder, placement: Placement, sizes: Sequence[int], report: Callable[[str], None]
    ) -> None:
        self.reason: str | None = None
        self.seen_at: float | None = None  # in seconds since 1970
        self._folder, self._report = folder, report
        self._hosts: list[str] = []
        self._watch = ClusterWatch(placement, sizes, self._find_hosts)

    def look(self) -> None:
        if self.reason is not None:
            return
        try:
            reason = self._watch.look()
        except Exception:  # Ray raises several types where its head does not answer; then `fit()` ends too.
            return
        if reason:
            self.reason, self.seen_at = reason, time.time()
            self._report(f"{reason}: saving a checkpoint")
            request_stop_of(self._folder, self._report)

    def _find_hosts(self) -> list[str]:
        if not self._hosts and (ranks := self._folder.ranks()) and ranks.attempt == self._folder.attempt:
            self._hosts = ranks.nodes
        return self._hosts


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
        self._begun, self._look_at = False, 0.0

    def have_begun(self) -> bool:
        now = time.monotonic()
        if not self._begun and now >= self._look_at:
            self._look_at = now + self._folder.storage.poll_seconds
            try:
                self._begun = self._folder.spool.end() != self._end_before
            except StorageError:  # It is not known: give the ranks time to save.
                return True
        return self._begun

    def report_if_late(self) -> None:
        if time.monotonic() <= self._late_at:
            return
        self._late_at = math.inf
        if not self.have_begun():
            self._report(
                f"no rank has begun after {LONG_START_SECONDS:g} s: {self._placement.workers} wait for {self._placement} each; "
                f"{free_resources()} are free in the cluster"
            )


def train_on_ray(attempt: Attempt, placement: Placement, give_up: Callable[[], bool]) -> Outcome | None:
    """Run the ranks to their end; return None where `give_up()` returned true first.

    Raises RankFailed, RanksLost or TrainingError with the message of the rank that failed, NotPlaced where the cluster
    had no room.
    """
    # A path that every node has: Ray Train's controller may run on another one.
    ray_files = Path(tempfile.gettempdir()) / f"resnet-dist-{os.getuid()}" / "ray"
    trainer = DataParallelTrainer(
        rank_main,
        train_loop_config=orders_of(attempt, gpu=placement.gpu),
        backend_config=MeetingConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpu,
            resources_per_worker=resources_of(placement),
        ),
        run_config=ray.train.RunConfig(
            # Ray Train writes a few small files of its own, which nothing else reads.
            name=attempt.token,
            storage_path=str(ray_files),
            failure_config=ray.train.FailureConfig(
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
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
        raise explain(box[0])
    return Outcome(**box[0])


def orders_of(attempt: Attempt, *, gpu: bool) -> dict[str, Any]:
    """Return the orders of all ranks as plain values: a process without torch passes them on."""
    timeout = collective_timeout_seconds(attempt.recipe.train.stall_timeout_seconds)
    return {"attempt": asdict(attempt), "gpu": gpu, "timeout_seconds": timeout, "preload": is_on()}


def _fit(trainer: DataParallelTrainer, box: list[Any]) -> None:
    try:
        box.append(trainer.fit().return_value)
    except BaseException as error:  # `train_on_ray` raises it again in the main thread.
        box.append(error)
