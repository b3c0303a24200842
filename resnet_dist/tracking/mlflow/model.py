"""Log a trained model so that it loads without pickles, and where this package is not installed."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import mlflow
import numpy as np
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from packaging.version import Version

import resnet_dist.model
from resnet_dist.config import Recipe
from resnet_dist.tracking.mlflow.failure import explain
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.train.checkpoint.folder import MANIFEST, MODEL_FILE

NAME = "model"
SERVE_FILE = "serve.py"
# Without explicit requirements MLflow spends 14 s guessing them.
REQUIREMENTS = ("torch", "numpy", "safetensors", "mlflow")


def log_model(
    run: MlflowRun, checkpoint: Path, recipe: Recipe, step: int, metrics: Mapping[str, tuple[float, int]]
) -> str:
    """Log the model of a checkpoint folder as `model` of the run; return its model URI.

    The model maps uint8 images (N, H, W, C) to float32 probabilities (N, classes). metrics: those of its step, with
    their times in milliseconds. A server that knows no models apart from runs gets it as an artifact of the run.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / NAME
        logged = _create(run)
        if logged is None:
            _save(saved, checkpoint, recipe, Model(artifact_path=NAME, run_id=run.run_id))
            run.client.log_artifacts(run.run_id, str(saved), NAME)
            return f"runs:/{run.run_id}/{NAME}"
        model_id = logged.model_id
        try:
            described = Model(artifact_path=NAME, run_id=run.run_id, model_id=model_id, model_uuid=model_id)
            _save(saved, checkpoint, recipe, described)
            run.client.log_model_artifacts(model_id, str(saved))
        except BaseException:
            # MLflow would load the model of a run from this entry, which has no files.
            with suppress(Exception):
                run.client.delete_logged_model(model_id)
            raise
    run.client.finalize_logged_model(model_id, "READY")
    run.client.log_outputs(run.run_id, [LoggedModelOutput(model_id, step=step)])
    # The store keeps a metric of the same time, step and value once, so the run's own points are not doubled.
    points = [Metric(key, value, time, step, model_id=model_id) for key, (value, time) in metrics.items()]
    run.client.log_batch(run.run_id, metrics=points, synchronous=True)
    return f"models:/{model_id}"


def download_model(run_id: str, uri: str) -> Path:
    """Download the model that a run logged; return the checkpoint folder in it.

    Raises LookupError where the store has no such run or the run has no model.
    """
    client = mlflow.MlflowClient(uri, uri)
    try:
        outputs = client.get_run(run_id).outputs
        if outputs is not None and outputs.model_outputs:
            newest = max(outputs.model_outputs, key=lambda output: output.step)
            location = client.get_logged_model(newest.model_id).artifact_location
            folder = mlflow.artifacts.download_artifacts(location, tracking_uri=uri)
        else:  # logged to a server that knows no models apart from runs
            folder = client.download_artifacts(run_id, NAME)
    except Exception as error:  # The client of an artifact store may raise any type.
        raise LookupError(explain(error, uri).reason) from None
    return Path(folder) / "artifacts" / "checkpoint"


def _create(run: MlflowRun) -> LoggedModel | None:
    """Create the entry of a model in the run's experiment; None where the server has no such entries."""
    params = run.client.get_run(run.run_id).data.params
    try:
        return run.client.create_logged_model(
            run.experiment_id, NAME, source_run_id=run.run_id, params=params
        )
    except MlflowException as error:
        # MLflow 2 and Azure ML do not know the endpoint; RESOURCE_DOES_NOT_EXIST would be the run's.
        if error.get_http_status_code() in (404, 405, 501) and error.error_code != "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _save(folder: Path, checkpoint: Path, recipe: Recipe, described: Model) -> None:
    """Write the model to `folder` in MLflow's format, without a path of this machine."""
    classes = json.loads((checkpoint / MANIFEST).read_bytes())["classes"]
    size, channels = recipe.data.evaluation_size, recipe.data.channels
    signature = ModelSignature(
        Schema([TensorSpec(np.dtype("uint8"), (-1, size, size, channels))]),
        Schema([TensorSpec(np.dtype("float32"), (-1, len(classes)))]),
    )
    with tempfile.TemporaryDirectory() as parts, warnings.catch_warnings(), _without_git():
        warnings.simplefilter("ignore")  # MLflow's advice on type hints, for agents
        weights, code = Path(parts) / "checkpoint", Path(parts) / "resnet_dist_model"
        weights.mkdir()
        for name in (MODEL_FILE, MANIFEST):
            shutil.copy(checkpoint / name, weights)
        package = Path(resnet_dist.model.__file__).parent
        shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__"))
        mlflow.pyfunc.save_model(
            path=folder,
            mlflow_model=described,
            python_model=str(Path(__file__).with_name(SERVE_FILE)),
            artifacts={"checkpoint": str(weights)},
            code_paths=[str(code)],
            pip_requirements=requirements(),
            signature=signature,
        )
    flavor = described.flavors["python_function"]
    flavor["model_code_path"] = SERVE_FILE
    flavor["artifacts"]["checkpoint"]["uri"] = flavor["artifacts"]["checkpoint"]["path"]
    described.save(str(folder / "MLmodel"))
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)


def requirements() -> list[str]:
    """Return the packages that the model needs, in versions that an index has: torch 2.9.1, not the build 2.9.1+cu130."""
    return [f"{name}=={Version(version(name)).public}" for name in REQUIREMENTS]


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
