"""A rank that hangs is named; one that is slow, new to a phase, or paused is not."""

from __future__ import annotations

import platform
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Loader
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.rank import run_attempt
from resnet_dist.runs.folder import token_name
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.train import parts
from resnet_dist.train.watch.control import Control
from resnet_dist.train.watch.positions import POLLS_TO_ANSWER
from resnet_dist.train.watch.progress import FIRST_TIMEOUT_FACTOR, Progress
from resnet_dist.train.watch.watchdog import Stalled, Watchdog
from resnet_dist.world import World
from tests.train.ranks import run_ranks

TIMEOUT = 20.0
HOST = platform.node()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress() -> Progress:
    progress = Progress()
    for phase in ("waiting for data", "in the forward pass"):
        progress.at(phase, 3)
    return progress


@pytest.fixture
def watchdog(progress: Progress, clock: Clock) -> Watchdog:
    dog = Watchdog(progress, threading.current_thread(), World.single(), TIMEOUT, clock)
    dog.look()
    return dog


def seconds_until_alarm(dog: Watchdog, clock: Clock) -> tuple[float, str]:
    start = clock.now
    while clock.now - start < 10 * TIMEOUT:
        clock.now += dog.poll_seconds
        try:
            dog.look()
        except Stalled as alarm:
            return clock.now - start, str(alarm)
    return clock.now - start, "none"


def test_a_phase_may_take_its_time_and_the_first_time_longer(
    watchdog: Watchdog, progress: Progress, clock: Clock
) -> None:
    answer = (POLLS_TO_ANSWER + 1) * watchdog.poll_seconds
    first, text = seconds_until_alarm(watchdog, clock)
    assert FIRST_TIMEOUT_FACTOR * TIMEOUT <= first <= FIRST_TIMEOUT_FACTOR * TIMEOUT + answer
    assert text.startswith(f"nothing has moved on {HOST} for 60 s: at step 3, in the forward pass (")
    progress.at("waiting for data", 4)
    again, text = seconds_until_alarm(watchdog, clock)
    assert TIMEOUT <= again <= TIMEOUT + answer + watchdog.poll_seconds
    assert text.startswith(f"nothing has moved on {HOST} for 20 s: at step 4, waiting for data (")


def test_small_steps_are_progress(watchdog: Watchdog, progress: Progress, clock: Clock) -> None:
    for _ in range(100):
        progress.at("evaluating", 3)  # batch after batch
        clock.now += TIMEOUT / 3
        watchdog.look()


def test_a_pause_of_the_whole_process_is_no_stall(
    watchdog: Watchdog, progress: Progress, clock: Clock
) -> None:
    progress.at("waiting for data", 4)
    watchdog.look()
    clock.now += 1000 * TIMEOUT  # as after SIGSTOP, or on a laptop that slept
    watchdog.look()


def hang_in_a_batch(world: World, recipe_json: str, folder: str) -> str:
    """Train with a loader that hangs on rank 1 at its seventh batch; return the error."""
    batch_at = Loader.batch_at

    def hang(self: Loader, step: int) -> object:
        if step == 6 and world.rank == 1 and self.order.training:
            threading.Event().wait()
        return batch_at(self, step)

    Loader.batch_at = hang  # type: ignore[assignment,method-assign]
    return stall_of(world, recipe_json, folder)


def hang_at_the_start(world: World, recipe_json: str, folder: str) -> str:
    """Train with a Control that hangs on rank 1, while rank 0 waits for it in the store; return the error."""
    control = parts.Control

    def hang(*arguments: Any, **options: Any) -> Control:
        if world.rank == 1:
            threading.Event().wait()
        return control(*arguments, **options)

    parts.Control = hang  # type: ignore[assignment,misc]
    return stall_of(world, recipe_json, folder)


def stall_of(world: World, recipe_json: str, folder: str) -> str:
    open_storage(folder).write(token_name("t"), b"")
    try:
        run_attempt(Attempt(recipe_json, folder, cpus=1, number=1, token="t", host="here"), world)
    except Stalled as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("function", "timeout", "text"),
    [
        (
            hang_in_a_batch,
            4,
            r"rank 1 on \S+ has not moved for 4 s: at step 6, waiting for data \(loop\.py:.*the others wait ",
        ),
        (
            hang_at_the_start,
            2,
            r"none of 2 ranks has moved for 6 s: at step 0, starting, are rank 0 on \S+ \(control\.py:.*, rank 1 on \S+ \(parts\.py:",
        ),
    ],
)
def test_two_ranks_name_the_one_that_hangs(
    digits_recipe: Recipe, tmp_path: Path, function: Callable[..., str], timeout: int, text: str
) -> None:
    recipe = digits_recipe.with_overrides([f"train.stall_timeout_seconds={timeout}"])
    results = run_ranks(2, function, recipe.to_json(), str(tmp_path))
    # The rank that ends first may take the connection of the other one with it.
    named = [result for result in results if "Connection closed by peer" not in result]
    assert named, results
    for result in named:
        assert re.match(text, result), result
        assert result.endswith(f"(train.stall_timeout_seconds={timeout})")
