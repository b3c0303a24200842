"""A model as MLflow's own scoring server takes it: written, loaded, asked, and behind MLflow's routes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from resnet_dist.runs.folder import checkpoint_name
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow.logged.write import write_model
from resnet_dist.train.checkpoint.folder import MODEL_FILE, write_checkpoint
from resnet_dist.train.checkpoint.load import TrainedModel

DEVICE_VARIABLE = "MLFLOW_DEFAULT_PREDICTION_DEVICE"


class BadInput(ValueError):
    """An input that the model refuses, in one sentence; of several images it names the first bad one by its number."""


def write_scored(folder: Path, trained: TrainedModel) -> None:
    """Write a model that was loaded from anywhere to `folder`, in MLflow's format."""
    manifest = {
        "scalars": {"step": trained.step, "best": None},
        "recipe": trained.recipe.model_dump(mode="json"),
        "classes": list(trained.classes),
    }
    with tempfile.TemporaryDirectory() as parts:
        # Loaded weights are channels-last, which safetensors cannot store.
        state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
        weights = {Path(MODEL_FILE).stem: state}
        write_checkpoint(open_storage(parts), trained.step, weights, manifest)
        write_model(folder, Path(parts) / checkpoint_name(trained.step), trained.recipe, Model(), {})


class ScoredModel:
    """A model in MLflow's format, loaded to be served."""

    def __init__(self, folder: Path, *, gpu: bool) -> None:
        # The variable would win over what the command chose.
        os.environ.pop(DEVICE_VARIABLE, None)
        config = {"device": "cuda" if gpu else "cpu"}
        self._loaded = mlflow.pyfunc.load_model(str(folder), model_config=config)
        # The object of serve.py: its `views` and `probabilities` may be replaced, and the routes of MLflow then use these.
        self.classifier: Any = self._loaded.unwrap_python_model()

    @property
    def classes(self) -> list[str]:
        return list(self.classifier.classes)

    def classify(self, images: Sequence[bytes], top_k: int) -> list[dict[str, Any]]:
        """Return classes and probabilities of encoded images. Raises BadInput."""
        try:
            rows = self.classifier.predict(None, list(images), {"top_k": top_k})
        except MlflowException as refused:
            raise BadInput(refused.message) from None
        found: list[dict[str, Any]] = rows.to_dict("records")
        return found

    def mlflow_app(self) -> Any:
        """Return MLflow's own application: /invocations, /ping, /health and /version."""
        from mlflow.pyfunc import scoring_server

        return scoring_server.init(self._loaded)
