"""The driver's tracker: an MLflow run, and the thread that feeds it from the spool."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from mlflow.exceptions import MlflowException

from resnet_dist.config import Recipe
from resnet_dist.data.index import read_index
from resnet_dist.tracking.model import log_model
from resnet_dist.tracking.run import MlflowRun, Status
from resnet_dist.tracking.spool import Entry, read_layers
from resnet_dist.tracking.upload import Uploader
from resnet_dist.train.gradients import GRADIENT_NORMS

log = logging.getLogger(__name__)


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

    @property
    def experiment_id(self) -> str:
        return self._run.experiment_id

    def start(self) -> None:
        self._uploader.start()

    def finish(self, timeout_seconds: float) -> int:
        unsent = self._uploader.finish(timeout_seconds)
        if self._recipe.train.log_gradient_norms:
            self._log_gradient_norms()
        return unsent

    def _log_gradient_norms(self) -> None:
        norms = read_layers(self._spool, GRADIENT_NORMS)
        try:
            self._run.client.log_dict(self._run.run_id, norms, f"{GRADIENT_NORMS}.json")
        except (MlflowException, OSError) as error:
            log.warning(
                "the gradient norms were not logged to MLflow (%s); they are in %s", error, self._spool
            )

    def log_model(self, checkpoint: Path, step: int) -> None:
        try:
            log_model(self._run, checkpoint, self._recipe, read_index(self._recipe.data.train).classes, step)
        except (MlflowException, OSError) as error:
            log.warning("the model was not logged to MLflow (%s); it is in %s", error, checkpoint)

    def close(self, status: Status) -> None:
        try:
            self._run.close(status)
        except MlflowException as error:
            log.warning("the MLflow run could not be closed as %s: %s", status, error)
