"""One attempt of a run as one rank sees it: the same function under Ray Train, torchrun and in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from resnet_dist.config import Recipe, UserError
from resnet_dist.data.remote import StorageError
from resnet_dist.runs import SPOOL_FILE, STOP_FILE
from resnet_dist.tracking.spool import Spool
from resnet_dist.train.guards import out_of_memory
from resnet_dist.train.loop import NullTracker, Outcome, train
from resnet_dist.train.meter import TrainingError
from resnet_dist.train.progress import FIRST_TIME, Progress
from resnet_dist.train.watchdog import Watchdog
from resnet_dist.world import World

TRAINING_THREAD = "train"
LOOK_SECONDS = 0.2  # between two looks at the training thread, and at the stop file


class RankFailed(RuntimeError):
    """A rank ended with an error: which rank, and its own words."""


@dataclass(frozen=True)
class Attempt:
    """What every rank is told. Plain values: it travels to other machines."""

    recipe_json: str
    folder: str
    threads: int  # of the CPU, per rank

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self.recipe_json)


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
    box: list[Outcome | BaseException] = []
    thread = threading.Thread(
        target=_train_rank,
        args=(attempt, recipe, world, stop_requested, progress, box),
        name=TRAINING_THREAD,
        daemon=True,
    )
    thread.start()
    watchdog = Watchdog(progress, thread, world, recipe.train.stall_timeout_seconds)
    try:
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            watchdog.look()
            if give_up():
                return None
    finally:
        watchdog.close()
    if isinstance(box[0], BaseException):
        raise box[0]
    return box[0]


def collective_timeout_seconds(recipe: Recipe) -> float:
    """How long a collective may take: longer than the watchdog, which names the rank that is behind."""
    return 2 * FIRST_TIME * recipe.train.stall_timeout_seconds


def left_alone() -> bool:
    """Whether a training thread still runs: the process must then be left without waiting for it."""
    return any(thread.name == TRAINING_THREAD for thread in threading.enumerate())


def is_echo(error: BaseException) -> bool:
    """Whether a rank only says that another one went away."""
    text = str(error)
    return any(
        word in text for word in ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
    )


def _train_rank(
    attempt: Attempt,
    recipe: Recipe,
    world: World,
    stop_requested: Callable[[], bool],
    progress: Progress,
    box: list[Outcome | BaseException],
) -> None:
    try:
        torch.set_num_threads(attempt.threads)
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)  # of this thread
        folder = Path(attempt.folder)
        if world.is_main:
            asked = _StopFile(folder / STOP_FILE)
            with Spool(folder / SPOOL_FILE) as tracker:
                outcome = train(
                    recipe, folder, world, tracker, lambda: stop_requested() or asked.exists(), progress
                )
        else:
            outcome = train(recipe, folder, world, NullTracker(), stop_requested, progress)
        box.append(outcome)
    except (StorageError, UserError) as error:  # such as shards that were exchanged meanwhile
        box.append(TrainingError(str(error)))
    except BaseException as error:  # raised again by the thread that looks after this one
        box.append(out_of_memory(error, recipe, world) or error)


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
