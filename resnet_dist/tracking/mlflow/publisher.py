"""The publisher of a run in MLflow: the run itself, and the thread that feeds it from the spool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from resnet_dist.data.shards.index import read_index
from resnet_dist.runs.folder import Status
from resnet_dist.tracking.mlflow.model import log_model
from resnet_dist.tracking.mlflow.run import MlflowRun, warn_on_error
from resnet_dist.tracking.mlflow.upload import Uploader
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry, read_layers
from resnet_dist.train.checkpoint.folder import step_of
from resnet_dist.train.step.gradient_norms import GRADIENT_NORMS


class MlflowPublisher:
    """The MLflow run of a record, opened before the ranks start.

    Later failures are warnings, never raised.
    """

    def __init__(self, record: RunRecord, on_entry: Callable[[Entry], None]) -> None:
        self._recipe, self._spool = record.recipe, record.run.spool
        self._run = MlflowRun.open(record)
        self._uploader = Uploader(self._spool, self._run, on_entry)

    @property
    def run_id(self) -> str:
        return self._run.run_id

    def start(self) -> None:
        self._uploader.start()

    def finish(self, timeout_seconds: float) -> int:
        return self._uploader.finish(timeout_seconds)

    def log_results(self, checkpoint: Path | None) -> None:
        if self._recipe.train.log_gradient_norms:
            with warn_on_error(f"the gradient norms were not logged to MLflow; they are in {self._spool}"):
                norms = read_layers(self._spool, GRADIENT_NORMS)
                self._run.client.log_dict(self._run.run_id, norms, f"{GRADIENT_NORMS}.json")
        if checkpoint is not None:
            with warn_on_error(f"the model was not logged to MLflow; it is in {checkpoint}"):
                classes = read_index(self._recipe.data.train).classes
                log_model(self._run, checkpoint, self._recipe, classes, step_of(checkpoint.name))

    def close(self, status: Status, timeout_seconds: float) -> None:
        with warn_on_error(f"the MLflow run could not be closed as {status}"):
            self._run.close(status, timeout_seconds)
