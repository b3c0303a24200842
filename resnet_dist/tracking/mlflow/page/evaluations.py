"""Log an evaluation that was made after a run: on the run of the model, and linked to the logged model itself."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import mlflow
from mlflow.entities import Metric, Run

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import CHECKPOINTS_FOLDER, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow.database.connect import connect
from resnet_dist.tracking.mlflow.failure import explain
from resnet_dist.tracking.mlflow.logged.lookup import LAST, NAME, find_logged, run_of
from resnet_dist.tracking.mlflow.logged.reference import models_of
from resnet_dist.tracking.mlflow.run import MlflowRun, place_of
from resnet_dist.tracking.store import MODEL_SCHEMES, TrackerAway, sqlite_file, tracking_uri

FOLDER = "evaluations"  # of the artifacts of a run


@dataclass(frozen=True)
class EvaluatedModel:
    """The run of a model, and its entry among the logged models where the store has one."""

    run: MlflowRun
    step: int
    model_id: str | None

    @classmethod
    def find(cls, model: str, location: str, step: int, store: Path) -> Self:
        """Return the run in the store of an output that trained `model`, as it was typed.

        location: of its checkpoint, whose run folder names the run too. Raises UserError where no run has it,
        TrackerAway where the store does not answer.
        """
        uri = tracking_uri(store)
        file = sqlite_file(uri)
        if file is not None and not file.exists():
            raise UserError(f"--log: {model!r} belongs to no run, as there is no MLflow store at {file}")
        try:
            client = connect(uri)
            found = _run(client, model, location)
            model_id = _model_id(client, found, step)
        except (UserError, LookupError):
            raise UserError(f"--log: {place_of(uri)} has no run that {model!r} belongs to") from None
        except Exception as error:  # The client of a store may raise any type.
            failure = explain(error, uri)
            kind = UserError if failure.is_mistake else TrackerAway
            raise kind(f"--log: {place_of(uri)}: {failure.reason}") from None
        run = MlflowRun(client, uri, store, found.info.experiment_id, found.info.run_id)
        return cls(run, step, model_id)

    def log(self, name: str, metrics: Mapping[str, float], files: Mapping[str, bytes], data: str) -> None:
        """Log metrics as NAME/METRIC at the model's step, and files under evaluations/NAME.

        data: the name of the data set, which MLflow shows with the metrics. Raises what the store raises.
        """
        now = time.time_ns() // 1_000_000
        # The digest is what MLflow tells data sets of one name apart by.
        link = (
            {"model_id": self.model_id, "dataset_name": data, "dataset_digest": name} if self.model_id else {}
        )
        points = [Metric(f"{name}/{key}", value, now, self.step, **link) for key, value in metrics.items()]
        self.run.client.log_batch(self.run.run_id, metrics=points, synchronous=True)
        self.run.log_files({f"{FOLDER}/{name}/{file}": content for file, content in files.items()})


def _run(client: mlflow.MlflowClient, model: str, location: str) -> Run:
    """Return the run of a model. Raises LookupError, UserError, or what the client raises."""
    if model.startswith(MODEL_SCHEMES):
        return client.get_run(_run_id_of(client, model))
    checkpoints, _, _ = location.rpartition("/")
    if checkpoints.endswith(f"/{CHECKPOINTS_FOLDER}"):
        record = read_run(open_storage(checkpoints.removesuffix(f"/{CHECKPOINTS_FOLDER}")))
        if record is not None and record.run_id:
            return client.get_run(record.run_id)
    return run_of(client, model)


def _run_id_of(client: mlflow.MlflowClient, uri: str) -> str:
    if uri.startswith("runs:/"):
        return uri.split("/")[1]
    run_id = find_logged(client, uri).run_id
    if run_id is None:
        raise LookupError(uri)
    return run_id


def _model_id(client: mlflow.MlflowClient, run: Run, step: int) -> str | None:
    """Return the logged model of the run at this step, the one with its weights where it has one; None without any."""
    outputs = run.outputs.model_outputs if run.outputs is not None else []
    at_step = [output.model_id for output in outputs if output.step == step]
    if len(at_step) < 2:
        return at_step[0] if at_step else None
    # A checkpoint that was published during the training is there twice, in any order.
    whole = {model.model_id for model in models_of(client, run.info.run_id) if model.name in (NAME, LAST)}
    linked: str = next((model_id for model_id in at_step if model_id in whole), at_step[-1])
    return linked


def check_name(name: str) -> None:
    """Raise UserError unless metrics may begin with this name: those of training must not be mixed with others."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
        raise UserError(f"--log {name!r}: use letters, digits, '.', '_' and '-', such as test")
    if name in ("train", "eval", "perf", "data", "system"):
        raise UserError(
            f"--log {name}: the run has metrics {name}/… of its training; use another name, such as test"
        )
