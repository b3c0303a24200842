"""The driver's tracker: an MLflow run, and the thread that feeds it from the spool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from resnet_dist.config import Recipe
from resnet_dist.data.index import read_index
from resnet_dist.runs import Status
from resnet_dist.tracking.model import log_model
from resnet_dist.tracking.run import MlflowRun, told
from resnet_dist.tracking.spool import Entry, read_layers
from resnet_dist.tracking.upload import Uploader
from resnet_dist.train.checkpoint import step_of
from resnet_dist.train.gradients import GRADIENT_NORMS


class MlflowTracking:
    """Opened before the ranks start; what fails later is told and never stops the training."""

    def __init__(
        self,
        output: Path,
        recipe: Recipe,
        *,
        name: str,
        run_id: str | None,
        key: str,
        source: str,
        spool: Path,
        tags: dict[str, str],
        on_entry: Callable[[Entry], None],
    ) -> None:
        self._run = MlflowRun.open(output, recipe, name, run_id, source, key)
        self._run.set_tags(tags)
        self._recipe, self._spool = recipe, spool
        self._uploader = Uploader(spool, self._run, on_entry)

    @property
    def run_id(self) -> str:
        return self._run.run_id

    def start(self) -> None:
        self._uploader.start()

    def finish(self, timeout_seconds: float) -> int:
        return self._uploader.finish(timeout_seconds)

    def log_results(self, checkpoint: Path | None) -> None:
        if self._recipe.train.log_gradient_norms:
            with told(f"the gradient norms were not logged to MLflow; they are in {self._spool}"):
                norms = read_layers(self._spool, GRADIENT_NORMS)
                self._run.client.log_dict(self._run.run_id, norms, f"{GRADIENT_NORMS}.json")
        if checkpoint is not None:
            with told(f"the model was not logged to MLflow; it is in {checkpoint}"):
                classes = read_index(self._recipe.data.train).classes
                log_model(self._run, checkpoint, self._recipe, classes, step_of(checkpoint))

    def close(self, status: Status, timeout_seconds: float) -> None:
        with told(f"the MLflow run could not be closed as {status}"):
            self._run.close(status, timeout_seconds)
