"""The MLflow run that a study's runs lie under; it holds what they say together."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from mlflow.exceptions import MlflowException

from resnet_dist.data.tar import write_text_atomically
from resnet_dist.tracking.run import PARENT_TAG, MlflowRun, Status

log = logging.getLogger(__name__)

STUDY_FILE = "study.json"


class MlflowStudy:
    """Opened before the first run; what fails later is told and never stops the study."""

    def __init__(
        self, output: Path, folder: Path, *, experiment: str, name: str, source: str, description: str
    ) -> None:
        """Create the parent run, or continue the one that `folder` knows. Raises UserError."""
        file = folder / STUDY_FILE
        run_id = json.loads(file.read_text())["run_id"] if file.exists() else None
        self._run = MlflowRun.open_parent(output, experiment, name, run_id, source, description)
        self._run.set_tags({"study": name})
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps({"run_id": self._run.run_id}) + "\n")
        self._name, self._folder = name, folder

    def member_tags(self) -> dict[str, str]:
        """What makes a run one of this study's."""
        return {PARENT_TAG: self._run.run_id, "study": self._name}

    def is_finished(self, run_id: str) -> bool:
        """Whether MLflow has the run as one that came to its end; False where it is not known there."""
        try:
            status: str = self._run.client.get_run(run_id).info.status
        except MlflowException:
            return False
        return status == "FINISHED"

    def log_files(self, *files: Path) -> None:
        try:
            for file in files:
                self._run.client.log_artifact(self._run.run_id, str(file))
        except (MlflowException, OSError) as error:
            log.warning("%s was not logged to MLflow (%s); it is in %s", file.name, error, self._folder)

    def close(self, status: Status, conclusion: str) -> None:
        try:
            self._run.set_tags({"conclusion": conclusion})
            self._run.close(status)
        except MlflowException as error:
            log.warning("the MLflow run of the study could not be closed as %s: %s", status, error)
