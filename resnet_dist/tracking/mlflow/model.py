"""Log a trained model so that it loads without pickles, and where this package is not installed."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

import resnet_dist.model
from resnet_dist.config import Recipe
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.tracking.store import URI_VARIABLE
from resnet_dist.train.checkpoint.folder import MANIFEST, MODEL_FILE

# Without explicit requirements MLflow spends 14 s guessing them.
REQUIREMENTS = ("torch", "numpy", "safetensors", "mlflow")


def log_model(run: MlflowRun, checkpoint: Path, recipe: Recipe, classes: tuple[str, ...], step: int) -> str:
    """Log the model of a checkpoint folder as `model` of the run; return its model URI.

    The model maps uint8 images (N, H, W, C) to float32 probabilities (N, classes).
    """
    size, channels = recipe.data.evaluation_size, recipe.data.channels
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("uint8"), (-1, size, size, channels))]),
        Schema([TensorSpec(np.dtype("float32"), (-1, len(classes)))]),
    )
    with tempfile.TemporaryDirectory() as folder, _quiet(), _without_git():
        weights = Path(folder) / "checkpoint"
        weights.mkdir()
        for name in (MODEL_FILE, MANIFEST):
            shutil.copy(checkpoint / name, weights)
        code = Path(folder) / "resnet_dist_model"
        shutil.copytree(
            Path(resnet_dist.model.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__")
        )
        with _default_store(run.uri), mlflow.start_run(run_id=run.run_id):
            info = mlflow.pyfunc.log_model(
                name="model",
                python_model=str(Path(__file__).with_name("serve.py")),
                artifacts={"checkpoint": str(weights)},
                code_paths=[str(code)],
                pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
                signature=signature,
                step=step,
            )
    return str(info.model_uri)


def download_model(run_id: str, uri: str) -> Path:
    """Download the model that a run logged; return the checkpoint folder in it.

    Raises LookupError where the store has no such run or the run has no model.
    """
    with _quiet(), _default_store(uri):
        try:
            folder = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/model")
        except MlflowException as error:
            raise LookupError(str(error)) from None
    return Path(folder) / "artifacts" / "checkpoint"


@contextmanager
def _default_store(uri: str) -> Iterator[None]:
    """Make `uri` the store of MLflow's model functions, which know one store per process.

    Restores the variable that names a server afterwards, because these functions set it.
    """
    before = os.environ.get(URI_VARIABLE)
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # This removes the variable too.
        if before is not None:
            os.environ[URI_VARIABLE] = before


@contextmanager
def _without_git() -> Iterator[None]:
    """Keep MLflow from running git, which it waits for as long as that takes. The run has its commit already."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "git"}
    for name in before:
        del sys.modules[name]
    sys.modules["git"] = None  # type: ignore[assignment]  # An import now raises ImportError.
    try:
        yield
    finally:
        del sys.modules["git"]
        sys.modules.update(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings about type hints and progress that MLflow prints while it logs a model."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
