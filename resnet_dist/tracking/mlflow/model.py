"""Log a trained model with its run, and get it back."""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModel, LoggedModelOutput, Metric
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.tracking.mlflow.failure import explain, lacks_endpoint
from resnet_dist.tracking.mlflow.logged.lookup import NAME, find_logged
from resnet_dist.tracking.mlflow.logged.reference import STEP_TAG, replace_reference
from resnet_dist.tracking.mlflow.logged.write import CHECKPOINT, write_model
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.train.checkpoint.folder import MANIFEST

_REMOTE = re.compile("(?!file:)[a-z][a-z0-9+.-]+:")  # s3://…, mlflow-artifacts:/…, runs:/…


def log_model(
    run: MlflowRun,
    checkpoint: Path,
    recipe: Recipe,
    step: int,
    metrics: Mapping[str, tuple[float, int]],
    name: str = NAME,
) -> str:
    """Log the model of a checkpoint folder as model `name` of the run; return its model URI.

    The model maps encoded images or pixels to class names and probabilities, see logged/serve.py. metrics: those of its
    step, with their times in milliseconds. A server that knows no models apart from runs gets it as an artifact.
    """
    values = {key: value for key, (value, _) in metrics.items()}
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / name
        logged = _create(run, name, step)
        if logged is None:
            write_model(saved, checkpoint, recipe, Model(artifact_path=name, run_id=run.run_id), values)
            run.client.log_artifacts(run.run_id, str(saved), name)
            return f"runs:/{run.run_id}/{name}"
        model_id = logged.model_id
        try:
            described = Model(artifact_path=name, run_id=run.run_id, model_id=model_id, model_uuid=model_id)
            write_model(saved, checkpoint, recipe, described, values)
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
    replace_reference(run, step)
    return f"models:/{model_id}"


def download_model(name: str, uri: str) -> Path | str:
    """Download a model of the store `uri`; return the checkpoint folder in it, or the place of the one it refers to.

    name: a run by its id or name, or a model as `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/ID/model`.
    Raises LookupError where the store has no such thing, UserError where it is a model of another kind.
    """
    try:
        found = find_logged(mlflow.MlflowClient(uri, uri), name)
        if found.reference is not None:
            return found.reference
        location = found.location
        folder = mlflow.artifacts.download_artifacts(
            location, dst_path=_folder_for(location), tracking_uri=uri
        )
    except LookupError:
        raise
    except Exception as error:  # The client of an artifact store may raise any type.
        raise LookupError(explain(error, uri).reason) from None
    return checkpoint_in(Path(folder), name)


def checkpoint_in(folder: Path, name: str) -> Path:
    """Return the checkpoint folder of a logged model. Raises UserError where the model is of another kind."""
    checkpoint = folder / "artifacts" / CHECKPOINT
    if not (checkpoint / MANIFEST).exists():
        raise UserError(f"{name}: {_kind_of(folder)}, which resnet_dist did not log and cannot read")
    return checkpoint


def _kind_of(folder: Path) -> str:
    try:
        flavors = [flavor for flavor in Model.load(str(folder)).flavors if flavor != "python_function"]
    except Exception:  # no MLmodel, or one that cannot be parsed
        return "no model of MLflow"
    return f"a model of {flavors[0]}" if flavors else "a model of another program"


def _folder_for(location: str) -> str | None:
    """Return a folder for a download, which goes with this process; None for a model that is read where it lies."""
    if _REMOTE.match(location) is None:
        return None
    folder = tempfile.mkdtemp(prefix="resnet-dist-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _create(run: MlflowRun, name: str, step: int) -> LoggedModel | None:
    """Create the entry of a model in the run's experiment; None where the server has no such entries."""
    params = run.client.get_run(run.run_id).data.params
    try:
        return run.client.create_logged_model(
            run.experiment_id, name, run.run_id, {STEP_TAG: str(step)}, params
        )
    except MlflowException as error:
        if lacks_endpoint(error):
            return None
        raise
