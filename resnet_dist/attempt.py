"""One attempt of a run as one rank sees it: the same function under Ray Train, torchrun and in one process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from resnet_dist.config import Recipe, UserError
from resnet_dist.data.remote import StorageError
from resnet_dist.runs import SPOOL_FILE, STOP_FILE
from resnet_dist.tracking.spool import Spool
from resnet_dist.train.loop import NullTracker, Outcome, train
from resnet_dist.train.meter import TrainingError
from resnet_dist.world import World


@dataclass(frozen=True)
class Attempt:
    """What every rank is told. Plain values: it travels to other machines."""

    recipe_json: str
    folder: str
    threads: int  # of the CPU, per rank


def run_attempt(attempt: Attempt, world: World) -> Outcome:
    """Train as one rank of `world`. The driver asks it to stop through a file in the run folder."""
    torch.set_num_threads(attempt.threads)
    folder, recipe = Path(attempt.folder), Recipe.from_json(attempt.recipe_json)
    try:
        if not world.is_main:
            return train(recipe, folder, world, NullTracker())
        with Spool(folder / SPOOL_FILE) as tracker:
            return train(recipe, folder, world, tracker, stop_requested=(folder / STOP_FILE).exists)
    except (StorageError, UserError) as error:  # such as shards that were exchanged meanwhile
        raise TrainingError(str(error)) from None


@contextmanager
def signals_call(ask: Callable[[int], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `ask(count)`, 1 for the first; a second one of them is for the caller."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread: whoever runs us in another has his own way to stop
        return
    count = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        ask(count)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
