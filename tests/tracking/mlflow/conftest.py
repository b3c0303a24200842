"""Fixtures of the tests that need a store, and a run in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.runs.folder import RunFolder, stored_recipe
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.spool import Spool
from resnet_dist.tracking.store import STORE_FILE, URI_VARIABLE
from resnet_dist.train.loop import train
from resnet_dist.world import World


@pytest.fixture(autouse=True)
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URI_VARIABLE, raising=False)


@pytest.fixture
def output(tmp_path: Path, empty_store: Path) -> Path:
    """Return an output folder with an empty store."""
    folder = tmp_path / "output"
    folder.mkdir()
    shutil.copy(empty_store, folder / STORE_FILE)
    return folder


@pytest.fixture
def trained(output: Path, digits_recipe: Recipe) -> RunFolder:
    """Return a finished run that was trained without MLflow."""
    recipe = digits_recipe.with_overrides(["train.length=2 steps", "train.log_every=1 steps"])
    place = open_storage(output / "runs/x")
    made = RunFolder(place, "x", None, 1, stored_recipe(recipe), key="x", tags={"by": "me"}, tracker="")
    made.write()
    with Spool(made.spool) as spool:
        train(recipe, place.location, World.single(), spool)
    made = made.ended("FINISHED", ["everything"])
    made.write()
    return made
