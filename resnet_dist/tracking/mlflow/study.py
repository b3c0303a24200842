"""The MLflow run that a study's runs lie under; it holds what they say together."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

from mlflow.exceptions import MlflowException

from resnet_dist.runs.folder import Status
from resnet_dist.system.files import write_text_atomically
from resnet_dist.tracking.mlflow.run import CLOSE_SECONDS, PARENT_TAG, MlflowRun, warn_on_error
from resnet_dist.tracking.protocol import StudyRecord

STUDY_FILE = "study.json"


class MlflowStudy:
    """Opened before the first run; what fails later is warn_on_error and never stops the study."""

    def __init__(self, record: StudyRecord) -> None:
        """Create the parent run, or continue the one that the study's folder names. Raises UserError."""
        folder, name = record.folder, record.name
        file = folder / STUDY_FILE
        known = json.loads(file.read_text()) if file.exists() else {}
        run_id, key = known.get("run_id"), known.get("key") or uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        # Write the key first: a process that dies before the id is known finds its run by it.
        write_text_atomically(file, json.dumps({"run_id": run_id, "key": key}) + "\n")
        self._run = MlflowRun.open_parent(record, run_id, key)
        write_text_atomically(file, json.dumps({"run_id": self._run.run_id, "key": key}) + "\n")
        self._run.set_tags({"study": name})
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
        for file in files:
            with warn_on_error(f"{file.name} was not logged to MLflow; it is in {self._folder}"):
                self._run.client.log_artifact(self._run.run_id, str(file))

    def close(self, status: Status, conclusion: str) -> None:
        with warn_on_error("the conclusion of the study was not logged to MLflow"):
            self._run.set_tags({"conclusion": conclusion})
        with warn_on_error(f"the MLflow run of the study could not be closed as {status}"):
            self._run.close(status, CLOSE_SECONDS)
