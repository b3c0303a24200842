"""Run one attempt as one rank: the same function under Ray Train, under torchrun and in a single process."""

from __future__ import annotations

import platform
import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from resnet_dist.config import Recipe
from resnet_dist.errors import StorageError, Superseded, TrainingError, UserError
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.fence import Fence
from resnet_dist.launch.preload.wire import NOTES
from resnet_dist.launch.run_storage import StallWriter, StopWatch, check_shared, report_notes
from resnet_dist.launch.start_times import (
    BEGIN,
    CHECKPOINT,
    CONNECTED,
    DATA,
    ENDED,
    IMPORTS,
    PROCESSES,
    STEP,
    describe_start,
    phases_of,
    process_start,
)
from resnet_dist.runs.folder import SPOOL_FILE, RankPlaces
from resnet_dist.runs.page import EVALUATIONS_FOLDER
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Unreachable, wait_for_permit
from resnet_dist.system.command import TRAINING_THREAD
from resnet_dist.system.environment.network import follow_nccl, interface_problem
from resnet_dist.system.limit import Call
from resnet_dist.system.node.versions import driver_version, hosts_text, package_versions
from resnet_dist.tracking.origin import MACHINE_PREFIX
from resnet_dist.tracking.spool import Spool, evaluated_steps
from resnet_dist.train.device import explain_nondeterminism
from resnet_dist.train.loop import Outcome, train
from resnet_dist.train.start.threads import choose_threads
from resnet_dist.train.tracker import NullTracker
from resnet_dist.train.watch.guards import out_of_memory
from resnet_dist.train.watch.progress import Progress
from resnet_dist.train.watch.watchdog import Watchdog
from resnet_dist.world import World

STORE_BACKLOG = 1024  # ranks that connect at the same time
FIRST_STEP_SECONDS = 2.0  # that an interrupted rank waits for its first step


def carry_out(orders: dict[str, Any]) -> dict[str, Any]:
    """Join the other ranks and train, in a process that is this rank's alone; return the fields of the Outcome."""
    attempt = Attempt(**orders["attempt"])
    attempt.marks[IMPORTS] = time.time()
    report_notes(attempt, orders.get(NOTES, {}))
    # It is not closed: this process ends with its driver's run, also while it waits for the other ranks to return.
    fence = Fence.of(attempt, exits=True)
    outcome = run_attempt(attempt, _join(orders), node=orders["node"], fence=fence)
    assert outcome is not None  # Only the driver gives up; a rank has no `give_up`.
    dist.destroy_process_group()
    return asdict(outcome)


def _join(orders: dict[str, Any]) -> World:
    """Set up the process group of the ranks. Raises TrainingError where the network of this node is set up wrongly."""
    if orders["gpu"]:
        follow_nccl()
    rank, size, seconds = orders["rank"], orders["world_size"], orders["timeout_seconds"]
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            orders["address"],
            orders["port"],
            size,
            is_master=rank == 0,
            timeout=timedelta(seconds=seconds),
            # The store would listen on every interface, and it asks nobody for a password.
            master_listen_fd=_listen(orders["address"], orders["port"]) if rank == 0 else None,
        )
        return World.join(
            store,
            rank=rank,
            local_rank=orders["device"],
            world_size=size,
            gpu=orders["gpu"],
            timeout_seconds=seconds,
        )
    except RuntimeError as error:
        if (sentence := interface_problem(f"{error} ip={orders['node_address']}")) is not None:
            raise TrainingError(sentence) from None
        raise


def _listen(address: str, port: int) -> int | None:
    """Return a socket that listens at one address alone, which its user closes; None where the store must listen itself."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=STORE_BACKLOG).detach()
    except OSError:  # Ray may know this machine by the address of a gateway. The store reports all else.
        return None


def run_attempt(
    attempt: Attempt,
    world: World,
    stop_requested: Callable[[], bool] = lambda: False,
    give_up: Callable[[], bool] = lambda: False,
    node: str = "",
    fence: Fence | None = None,
) -> Outcome | None:
    """Train as one rank of `world`; return None where `give_up()` returned true first.

    node: Ray's id of this machine, recorded with the place of the rank. fence: started by the caller, who closes
    it; None: one for a process that the driver is in, too. Raises Superseded where the rank may write no more.

    Training runs in a thread of its own, and this thread watches it: a collective that never ends runs no
    Python, so its thread could handle neither a signal nor the watchdog. After Stalled or None, the training
    thread is abandoned and may hang forever.
    """
    recipe, progress = attempt.recipe, Progress()
    attempt.marks.setdefault(PROCESSES, process_start())
    attempt.marks.setdefault(IMPORTS, time.time())
    own_fence = fence is None
    fence = fence or Fence.of(attempt)

    def must_stop() -> bool:  # An abandoned thread must not train on in a process that stays.
        return stop_requested() or fence.is_over

    training = Call(
        lambda: _train_rank(attempt, recipe, world, must_stop, progress, node, fence), TRAINING_THREAD
    )
    # Where rank 0 does not answer, the terminal of another one shows the line: under torchrun they share it.
    stalls = StallWriter(attempt, echoes=not world.is_main)
    watchdog = Watchdog(
        progress, training.thread, world, recipe.train.stall_timeout_seconds, report=stalls.write
    )
    stopped_at: float | None = None

    def has_nothing_to_save() -> bool:
        """Report whether a stop was requested some seconds ago and no step has been taken: data may never come."""
        nonlocal stopped_at
        if stopped_at is None and stop_requested():
            stopped_at = time.monotonic()
        return (
            stopped_at is not None
            and not progress.has_stepped
            and time.monotonic() - stopped_at >= FIRST_STEP_SECONDS
        )

    def look() -> None:
        fence.raise_if_over(progress.moves)
        watchdog.look()

    try:
        # With several ranks, another one may have taken the step: only the end of the grace time gives up.
        alone = world.world_size == 1
        return training.answer_unless(lambda: give_up() or (alone and has_nothing_to_save()), look)
    finally:
        if own_fence:
            fence.close()
        watchdog.close()
        stalls.close()


def is_echo(error: BaseException) -> bool:
    """Report whether `error` may only follow from another rank's: a broken collective names no cause."""
    if isinstance(error, (TrainingError, UserError)):
        return False
    text = str(error)
    return lost_peer(error) or any(library in text for library in ("gloo", "NCCL"))


def lost_peer(error: BaseException) -> bool:
    """Report whether `error` states that another rank went away."""
    phrases = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    return any(phrase in str(error) for phrase in phrases)


def _train_rank(
    attempt: Attempt,
    recipe: Recipe,
    world: World,
    stop_requested: Callable[[], bool],
    progress: Progress,
    node: str,
    fence: Fence,
) -> Outcome:
    try:
        threads = threads_of(attempt, recipe, world)
        torch.set_num_threads(threads)
        world = replace(world, cpus=attempt.cpus)
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # CUDA has a current device for each thread.
        check_shared(attempt, world)
        attempt.marks[CONNECTED] = time.time()
        places, version = world.gather((platform.node(), node)), attempt.order_version
        is_beside = attempt.evaluates_beside
        if not world.is_main:
            others = (stop_requested, progress, version, fence, None, () if is_beside else None)
            return train(recipe, attempt.folder, world, NullTracker(), *others)
        storage = open_storage(attempt.folder)
        hosts, nodes = map(list, zip(*places, strict=True))
        wait_for_permit(fence)
        RankPlaces(attempt.number, threads, hosts, nodes, attempt.cpus).write(storage)
        lines, evaluations = storage.log(SPOOL_FILE), storage.at(EVALUATIONS_FOLDER)
        logged = evaluated_steps(lines) if is_beside else None
        with closing(StopWatch(storage)) as watch, Spool(lines, fence, evaluations) as tracker:

            def stop() -> bool:
                return stop_requested() or watch.requested()

            tags = machine_tags(hosts, world, threads)
            progress.on_first_step = lambda: log_start(attempt, progress, tracker, tags)
            options = (stop, progress, version, fence, attempt.profiled, logged)
            return train(recipe, attempt.folder, world, tracker, *options)
    except (Superseded, Unreachable):  # The machines' fault: the driver starts the ranks again.
        raise
    # The driver has checked the recipe and the data: here something changed since, such as a shard.
    except (StorageError, UserError) as error:
        # What one node lacks, such as a folder that is not shared, is mended on that node.
        where = f"rank {world.rank} on {platform.node()}: " if world.world_size > 1 else ""
        raise TrainingError(f"{where}{error}") from None
    except BaseException as error:
        explained = out_of_memory(error, recipe, world) or explain_nondeterminism(error)
        if explained is not None:
            raise explained from None
        raise


def threads_of(attempt: Attempt, recipe: Recipe, world: World) -> int:
    """Return the CPU threads of this rank: the recipe's, else those that the run began with, else those that suit it."""
    if recipe.train.threads is not None:
        return recipe.train.threads
    if attempt.threads is not None:
        return min(attempt.threads, attempt.cpus)
    return (
        attempt.cpus
        if world.device.type == "cuda"
        else choose_threads(recipe, world.world_size, attempt.cpus)
    )


def machine_tags(hosts: list[str], world: World, threads: int) -> dict[str, str]:
    """Return the tags of the machines of an attempt: their names, the CPU threads of a rank, and what rank 0's has."""
    found = {"hosts": hosts_text(hosts), "threads": str(threads), **package_versions()}
    if world.device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(world.device)
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        found["nvidia_driver"] = driver_version() or "unknown"
    return {f"{MACHINE_PREFIX}{name}": text for name, text in found.items()}


def log_start(attempt: Attempt, progress: Progress, tracker: Spool, tags: dict[str, str]) -> None:
    """Record tags and the seconds that the start of this attempt took; a restart is shown, and a metric."""
    if BEGIN not in attempt.marks:  # The caller is no driver.
        return
    times = zip((CHECKPOINT, DATA, STEP), progress.start_times, strict=True)
    phases = phases_of({**attempt.marks, **dict(times)})
    seconds = round(sum(phases.values()), 3)
    start = {"attempt": attempt.number, "host": platform.node(), "seconds": seconds, "phases": phases}
    start["tags"] = tags
    if ENDED in attempt.marks:
        metrics = {"perf/restarts": float(attempt.restarts), "perf/restart_seconds": seconds}
        tracker.log_start(start, progress.step, metrics, describe_start(attempt.number, phases))
    else:
        tracker.log_start(start, progress.step, {}, None)
