"""Ray Train: start the ranks on a cluster, and report a failure as the error of the rank that failed first.

Ray places and starts the processes; the ranks set up the process group. DDP, checkpoints and metrics belong to the
loop, so a run under Ray computes what the other launchers compute. Each attempt is one `fit()`: Ray Train could retry by
itself, but it would retry a person's mistake too, and use numbers of ranks that the recipe does not allow.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from resnet_dist.launch.on_ray.settings import ignored_variables, set_defaults

set_defaults()

import ray
import ray.train
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.errors import RankFailed, RanksLost
from resnet_dist.launch.attempt import Attempt, ClusterChanged, RankLauncher
from resnet_dist.launch.on_ray.connect import check_gpus_here, connected, is_connected, is_own
from resnet_dist.launch.on_ray.evaluator.before_and_after import catch_up, settle, started
from resnet_dist.launch.on_ray.evaluator.schedule import BesideEvaluations
from resnet_dist.launch.on_ray.failures import NotPlaced, explain
from resnet_dist.launch.on_ray.placement.fit import Placement, choose_placement, cpus_per_rank, resources_of
from resnet_dist.launch.on_ray.placement.held import free_and_held
from resnet_dist.launch.on_ray.placement.nodes import nodes
from resnet_dist.launch.on_ray.placement.placer import Placer
from resnet_dist.launch.on_ray.watch import LONG_START_SECONDS, Change, StartWatch, request_stop_of
from resnet_dist.launch.on_ray.worker import MeetingConfig, rank_main
from resnet_dist.launch.preload.client import is_on, key_ahead
from resnet_dist.launch.ray_cluster.check import find_cluster
from resnet_dist.launch.ray_cluster.packages import check_packages
from resnet_dist.launch.start_times import PLACED
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.protocol import Unreachable
from resnet_dist.system.locks import own_folder
from resnet_dist.system.signals import StopRequest, handle_signals
from resnet_dist.train.loop import Outcome
from resnet_dist.train.watch.progress import collective_timeout_seconds

JOIN_SECONDS = 0.2
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
    cpus: int | None = None,
) -> Iterator[RankLauncher]:
    """Connect to a cluster, or start one, for as long as the context lasts; yield a launcher that uses it.

    A process that is connected uses that cluster. cpus: of each rank of a run that begins; None: as many as fit.
    gpu: None uses GPUs where there are any. wait_seconds: limit for a wait for nodes; None refuses a cluster that is
    too small now, and waits DEFAULT_WAIT_SECONDS where a node is lost later. Raises UserError where there is no
    cluster, or where it is too small.
    """
    with shared_ray(workers, gpu=gpu, address=address, report=report):
        alive, sizes = nodes(), workers.sizes(recipe)
        use_gpu = sum(node.gpus for node in alive) > 0 if gpu is None else gpu
        preferred = [size for size in sizes if size >= workers.preferred]
        if wait_seconds is None and not choose_placement(alive, preferred, None, gpu=use_gpu):
            # Raises the UserError that names what is missing.
            cpus_per_rank(alive, preferred[-1], gpu=use_gpu)
        limit = DEFAULT_WAIT_SECONDS if wait_seconds is None else wait_seconds
        placer = Placer(workers, sizes, gpu=use_gpu, wait_seconds=limit, report=report)
        with closing(BesideEvaluations(recipe, report, gpu=use_gpu)) as evaluations:

            def launch(folder: RunFolder) -> Outcome | None:
                try:
                    return fit_ranks(recipe, folder, placer, report, cpus, evaluations)
                # What takes ranks away often takes the storage away, which this process reads, too.
                except Unreachable as error:
                    raise RanksLost(str(error), begun=False) from None

            yield launch


@contextmanager
def shared_ray(
    workers: WorkerRange, *, gpu: bool | None, address: str | None, report: Callable[[str], None]
) -> Iterator[None]:
    """Connect to a cluster, or start one for `workers` ranks, unless this process is connected already.

    Raises UserError where there is no cluster, or where this machine has too few GPUs.
    """
    if is_connected():
        yield
        return
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
        yield


def fit_ranks(
    recipe: Recipe,
    folder: RunFolder,
    placer: Placer,
    report: Callable[[str], None],
    cpus: int | None,
    evaluations: BesideEvaluations,
) -> Outcome | None:
    """Run one attempt to its end; return None where it was interrupted before it could save.

    cpus: of each rank of a run that begins; None: as many as fit. evaluations: those beside training, which an earlier
    attempt may have left too. The first signal requests a checkpoint by the run's stop file; a second one, or the end of
    the grace time, gives the ranks up. Raises ClusterChanged where the ranks have saved because the cluster changed.
    """
    stop, since, before = StopRequest(), time.monotonic(), folder.ranks()
    report_at = 0.0
    if before is not None:
        cpus = before.cpus or before.threads
    with handle_signals(lambda count: stop.give_up()):
        beside = _begin_evaluations(evaluations, folder, placer, cpus, since, stop.expired)
    while True:
        with handle_signals(lambda count: stop.give_up()):
            # An earlier try may have moved the process.
            placer.reserved = beside.part if beside is not None else None
            placement = placer.place(cpus, since, stop.expired)
            if beside is not None and beside.part != placer.reserved:
                report("train.evaluate='beside': the ranks need its place: the ranks evaluate")
                catch_up(beside, folder, stop.expired)
                beside = None
        if placement is None:
            return None
        try:
            return _fit_placed(recipe, folder, placement, placer.sizes, stop, report, beside)
        except NotPlaced:  # Other jobs, or a node that has just gone, hold the resources.
            if placer.is_late(since):
                raise RankFailed(
                    f"the cluster had no room for {placement.workers} rank(s) with {placement} each in time (--wait); "
                    f"{free_and_held()}"
                ) from None
            if time.monotonic() >= report_at:
                report_at = time.monotonic() + LONG_START_SECONDS
                report(
                    f"waiting for room: {placement.workers} rank(s) need {placement} each; {free_and_held()}"
                )


def _begin_evaluations(
    evaluations: BesideEvaluations,
    folder: RunFolder,
    placer: Placer,
    cpus: int | None,
    since: float,
    give_up: Callable[[], bool],
) -> BesideEvaluations | None:
    """Return the evaluations beside this attempt; None where the ranks evaluate, once what was left is evaluated."""
    if evaluations.recipe.train.evaluate != "beside":
        catch_up(evaluations, folder, give_up)
        return None
    # Wait for the nodes first: only then it is known what the ranks leave.
    placer.reserved = None
    if placer.place(cpus, since, give_up) is None:
        return None
    return started(evaluations, folder, placer, cpus, give_up)


def _fit_placed(
    recipe: Recipe,
    folder: RunFolder,
    placement: Placement,
    sizes: Sequence[int],
    stop: StopRequest,
    report: Callable[[str], None],
    beside: BesideEvaluations | None,
) -> Outcome | None:
    start, change = StartWatch(folder, placement, report), Change(folder, placement, sizes, report)

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
        if beside is not None:
            beside.look(folder)
        return stop.expired()

    with handle_signals(request_stop):
        attempt = Attempt.of(recipe, folder, cpus=placement.cpus, marks={PLACED: time.time()})
        attempt = replace(attempt, evaluates_beside=beside is not None)
        outcome = train_on_ray(attempt, placement, give_up)
        if beside is not None:
            outcome = settle(beside, folder, outcome, stop.requested)
    if change.reason and not stop.requested() and outcome is not None and not outcome.finished:
        raise ClusterChanged(
            f"{change.reason}; the ranks saved step {outcome.step} and start again", change.seen_at
        )
    return outcome


def train_on_ray(attempt: Attempt, placement: Placement, give_up: Callable[[], bool]) -> Outcome | None:
    """Run the ranks to their end; return None where `give_up()` returned true first.

    Raises RankFailed, RanksLost or TrainingError with the message of the rank that failed, NotPlaced where the cluster
    had no room.
    """
    # Ray Train writes a few small files of its own on this machine, which nothing else reads.
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
    with own_folder(ray_files / attempt.token):
        thread.start()
        while thread.is_alive() and not give_up():
            thread.join(JOIN_SECONDS)
    if not box:
        return None
    if isinstance(box[0], BaseException):
        raise explain(box[0])
    return Outcome(**box[0])


def orders_of(attempt: Attempt, *, gpu: bool) -> dict[str, Any]:
    """Return the orders of all ranks as plain values: a process without torch passes them on."""
    timeout = collective_timeout_seconds(attempt.recipe.train.stall_timeout_seconds)
    orders = {"attempt": asdict(attempt), "gpu": gpu, "timeout_seconds": timeout, "preload": is_on()}
    # Ray that ends with this process has no other node.
    return {**orders, "imported": key_ahead() if is_own() else ""}


def _fit(trainer: DataParallelTrainer, box: list[Any]) -> None:
    try:
        box.append(trainer.fit().return_value)
    except BaseException as error:  # `train_on_ray` raises it again in the main thread.
        box.append(error)
