"""One attempt of a run as one rank sees it: the same function under Ray Train, torchrun and in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from resnet_dist.config import Recipe
from resnet_dist.errors import StorageError, TrainingError, UserError
from resnet_dist.launch.attempt import Attempt
from resnet_dist.runs.folder import SPOOL_FILE, STOP_FILE
from resnet_dist.system.command import TRAINING_THREAD
from resnet_dist.tracking.spool import Spool
from resnet_dist.train.loop import Outcome, train
from resnet_dist.train.tracker import NullTracker
from resnet_dist.train.watch.guards import out_of_memory
from resnet_dist.train.watch.progress import FIRST_TIME, Progress
from resnet_dist.train.watch.watchdog import Watchdog
from resnet_dist.world import World

Result = TypeVar("Result")
LOOK_SECONDS = 0.2  # between two looks at the training thread, and at the stop file


def run_attempt(
    attempt: Attempt,
    world: World,
    stop_requested: Callable[[], bool] = lambda: False,
    give_up: Callable[[], bool] = lambda: False,
) -> Outcome | None:
    """Train as one rank of `world`; None where `give_up()` came true first.

    Training has a thread of its own, and this one looks after it: a collective that never ends runs no Python,
    and would hear neither a signal nor the watchdog. Left alone (Stalled, or None) the thread may hang for ever.
    """
    recipe, progress = attempt.recipe, Progress()
    thread, box = _start(lambda: _train_rank(attempt, recipe, world, stop_requested, progress))
    watchdog = Watchdog(progress, thread, world, recipe.train.stall_timeout_seconds)
    try:
        return _wait(thread, box, give_up, watchdog.look)
    finally:
        watchdog.close()


def run_in_thread(function: Callable[[], Result], give_up: Callable[[], bool]) -> Result | None:
    """What `function` returns or raises; None where `give_up()` came true first, and it is left alone."""
    return _wait(*_start(function), give_up, lambda: None)


def _start(function: Callable[[], Result]) -> tuple[threading.Thread, list[Result | BaseException]]:
    box: list[Result | BaseException] = []

    def run() -> None:
        try:
            box.append(function())
        except BaseException as error:  # raised again by the thread that waits
            box.append(error)

    thread = threading.Thread(target=run, name=TRAINING_THREAD, daemon=True)
    thread.start()
    return thread, box


def _wait(
    thread: threading.Thread,
    box: list[Result | BaseException],
    give_up: Callable[[], bool],
    look: Callable[[], None],
) -> Result | None:
    while thread.is_alive():
        thread.join(LOOK_SECONDS)
        if thread.is_alive():
            look()
            if give_up():
                return None
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def collective_timeout_seconds(recipe: Recipe) -> float:
    """How long a collective may take: longer than the watchdog, which names the rank that is behind."""
    return 2 * FIRST_TIME * recipe.train.stall_timeout_seconds


def is_echo(error: BaseException) -> bool:
    """Whether a rank may only say that another one went away: collectives that broke off tell no more."""
    if isinstance(error, (TrainingError, UserError)):
        return False
    text = str(error)
    return lost_peer(error) or any(word in text for word in ("gloo", "NCCL"))


def lost_peer(error: BaseException) -> bool:
    """Whether the error says so in plain words."""
    words = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    return any(word in str(error) for word in words)


def _train_rank(
    attempt: Attempt, recipe: Recipe, world: World, stop_requested: Callable[[], bool], progress: Progress
) -> Outcome:
    try:
        torch.set_num_threads(attempt.threads)
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # of this thread
        folder = Path(attempt.folder)
        if not world.is_main:
            return train(recipe, folder, world, NullTracker(), stop_requested, progress)
        asked = _StopFile(folder / STOP_FILE)
        with Spool(folder / SPOOL_FILE) as tracker:
            return train(recipe, folder, world, tracker, lambda: stop_requested() or asked.exists(), progress)
    except (StorageError, UserError) as error:  # such as shards that were exchanged meanwhile
        raise TrainingError(str(error)) from None
    except BaseException as error:
        if (told := out_of_memory(error, recipe, world)) is not None:
            raise told from None
        raise


class _StopFile:
    """A file that the driver makes. Looked for now and then: on network storage each look takes milliseconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_at = -LOOK_SECONDS

    def exists(self) -> bool:
        now = time.monotonic()
        if now - self._looked_at < LOOK_SECONDS:
            return False
        self._looked_at = now
        return self._path.exists()
