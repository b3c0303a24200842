"""Garbage is collected rarely while a command imports, and at Python's own pace in training."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.system.memory import (
    DEFAULT_COLLECTIONS,
    FEW_COLLECTIONS,
    collect_normally,
    collect_rarely,
)
from resnet_dist.train.loop import train
from resnet_dist.train.tracker import NullTracker
from resnet_dist.world import World


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


def test_training_ends_the_time_of_few_collections(digits_recipe: Recipe, tmp_path: Path) -> None:
    seen = []

    class Tracker(NullTracker):
        def log(self, metrics: dict[str, float], step: int) -> None:
            seen.append((gc.get_threshold(), gc.get_freeze_count() > 10_000))

    collect_rarely()
    assert gc.get_threshold() == FEW_COLLECTIONS
    recipe = digits_recipe.with_overrides(["train.length=1 steps", "train.log_every=1 steps"])
    train(recipe, tmp_path, World.single(), Tracker())
    assert seen
    assert set(seen) == {(DEFAULT_COLLECTIONS, True)}


def test_a_program_that_set_its_own_pace_keeps_it() -> None:
    gc.set_threshold(123, 4, 5)
    collect_normally()
    assert gc.get_threshold() == (123, 4, 5)
    assert gc.get_freeze_count() == 0
