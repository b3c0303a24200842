"""Package a trained model for MLflow so that it loads where this package is not installed, without pickles."""

from __future__ import annotations

import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.models import ModelSignature
from mlflow.types import Schema, TensorSpec

import resnet_dist.model
from resnet_dist.config import Recipe
from resnet_dist.tracking.run import MlflowRun

REQUIREMENTS = ("torch", "numpy", "safetensors", "mlflow")  # named, or MLflow spends 14 s guessing them


def log_model(run: MlflowRun, checkpoint: Path, recipe: Recipe, classes: tuple[str, ...], step: int) -> str:
    """Log the model of a checkpoint folder as `model` of the run; returns its model URI."""
    size, channels = recipe.data.evaluation_size, recipe.data.channels
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("uint8"), (-1, size, size, channels))]),
        Schema([TensorSpec(np.dtype("float32"), (-1, len(classes)))]),
    )
    with tempfile.TemporaryDirectory() as folder, _quiet():
        weights = Path(folder) / "checkpoint"
        weights.mkdir()
        for name in ("model.safetensors", "checkpoint.json"):
            shutil.copy(checkpoint / name, weights)
        code = Path(folder) / "resnet_dist_model"
        shutil.copytree(
            Path(resnet_dist.model.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__")
        )
        mlflow.set_tracking_uri(run.uri)
        with mlflow.start_run(run_id=run.run_id):
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
    """The checkpoint folder inside the model that a run logged. Raises MlflowException where there is none."""
    mlflow.set_tracking_uri(uri)
    with _quiet():
        folder = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/model")
    return Path(folder) / "artifacts" / "checkpoint"


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow speaks of type hints and progress to whoever logs a model; the person asked for neither."""
    logger = logging.getLogger("mlflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
