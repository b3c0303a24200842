"""The publisher of a study: an MLflow run that is the parent of the study's runs and holds their result."""

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
    """The parent run, opened before the first run trains.

    Later failures are warnings and never stop the study.
    """

    def __init__(self, record: StudyRecord) -> None:
        """Create the parent run, or resume the one that the study's folder names. Raises UserError."""
        folder, name = record.folder, record.name
        file = folder / STUDY_FILE
        known = json.loads(file.read_text()) if file.exists() else {}
        run_id, key = known.get("run_id"), known.get("key") or uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        # Write the key first: a process that died before it knew the id finds its run by the key.
        write_text_atomically(file, json.dumps({"run_id": run_id, "key": key}) + "\n")
        self._run = MlflowRun.open_parent(record, run_id, key)
        write_text_atomically(file, json.dumps({"run_id": self._run.run_id, "key": key}) + "\n")
        self._run.set_tags({"study": name})
        self._name, self._folder = name, folder

    def member_tags(self) -> dict[str, str]:
        """Return the tags that make a run one of the study."""
        return {PARENT_TAG: self._run.run_id, "study": self._name}

    def is_finished(self, run_id: str) -> bool:
        """Report whether the run was closed as FINISHED; false for an unknown run."""
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
