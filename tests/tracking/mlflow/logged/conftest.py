"""A logged model of random weights, written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow.models import Model

from resnet_dist.tracking.mlflow.logged.write import write_model
from tests.checkpoints import COLORED, random_checkpoint

METRICS = {"eval/top1": 0.9861, "eval/samples": 360.0, "train/loss": 0.5}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("photos")
    paths = (f"data.train={data}/train", f"data.eval={data}/eval", f"data.shard_cache={data}/cache")
    return random_checkpoint(tmp_path_factory.mktemp("colored"), *COLORED, *paths)[0]


@pytest.fixture(scope="session")
def logged(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a logged model."""
    return write_logged(checkpoint, tmp_path_factory.mktemp("logged") / "model")


def write_logged(checkpoint: Path, folder: Path) -> Path:
    from resnet_dist.config import Recipe
    from resnet_dist.train.checkpoint.folder import read_checkpoint

    _, manifest = read_checkpoint(checkpoint, only=("model",))
    write_model(folder, checkpoint, Recipe.model_validate(manifest["recipe"]), Model(), METRICS)
    return folder
