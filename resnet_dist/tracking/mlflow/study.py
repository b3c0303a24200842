"""The publisher of a study: an MLflow run that is the parent of the study's runs and holds their result."""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import Status
from resnet_dist.system.files import write_text_atomically
from resnet_dist.tracking.limit import within
from resnet_dist.tracking.mlflow.failure import explain
from resnet_dist.tracking.mlflow.publisher import START_SECONDS, START_SECONDS_OF_FILE
from resnet_dist.tracking.mlflow.run import (
    CLOSE_SECONDS,
    KEY_TAG,
    PARENT_TAG,
    MlflowRun,
    place_of,
    warn_on_error,
)
from resnet_dist.tracking.protocol import StudyRecord
from resnet_dist.tracking.store import sqlite_file, tracking_uri

log = logging.getLogger(__name__)

STUDY_FILE = "study.json"
STUDY_TAG = "study"


class MlflowStudy:
    """The parent run, opened before the first run trains, or at the end where its store does not answer before.

    Later failures are warnings and never stop the study.
    """

    def __init__(self, record: StudyRecord) -> None:
        """Create the parent run, or resume the one that the study's folder names.

        Raises UserError for a person's mistake, such as a wrong password.
        """
        self._record, self._uri = record, tracking_uri(record.output)
        self._file = record.folder / STUDY_FILE
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._run_id, self._key = known.get("run_id"), known.get("key") or uuid.uuid4().hex
        self._run: MlflowRun | None = None
        record.folder.mkdir(parents=True, exist_ok=True)
        # Write the key first: a process that died before it knew the id finds its run by the key.
        self._write(self._run_id)
        seconds = START_SECONDS if sqlite_file(self._uri) is None else START_SECONDS_OF_FILE
        try:
            self._run = within(seconds, self._open)
        except Exception as error:  # A server may fail in any way; the runs train.
            failure = explain(error, self._uri)
            if failure.is_mistake:
                raise UserError(f"{place_of(self._uri)}: {failure.reason}") from None
            log.warning(
                "%s: %s; the study is published there at its end", place_of(self._uri), failure.reason
            )

    def member_tags(self) -> dict[str, str]:
        """Return the tags that make a run one of the study."""
        parent = {} if self._run is None else {PARENT_TAG: self._run.run_id}
        return {**parent, STUDY_TAG: self._record.name}

    def is_finished(self, run_id: str) -> bool:
        """Report whether the run was closed as FINISHED; false for an unknown run, and where MLflow does not answer."""
        if self._run is None:
            return False
        run = self._run
        try:
            return str(within(START_SECONDS, lambda: run.client.get_run(run_id)).info.status) == "FINISHED"
        except Exception:  # An unknown run, or a server that may fail in any way
            return False

    def log_files(self, *files: Path) -> None:
        for file in files:
            with warn_on_error(
                f"{file.name} was not logged to MLflow; it is in {self._record.folder}", self._uri
            ):
                run = self._opened()
                run.client.log_artifact(run.run_id, str(file))

    def close(self, status: Status, conclusion: str) -> None:
        with warn_on_error("the conclusion of the study was not logged to MLflow", self._uri):
            self._opened().set_tags({"conclusion": conclusion})
        with warn_on_error(f"the MLflow run of the study could not be closed as {status}", self._uri):
            self._opened().close(status, CLOSE_SECONDS)

    def _opened(self) -> MlflowRun:
        """Return the parent run. One that could not be opened before the runs is opened now, and gets its children."""
        if self._run is None:
            self._run = within(START_SECONDS, self._open)
            self._adopt(self._run)
        return self._run

    def _open(self) -> MlflowRun:
        run = MlflowRun.open_parent(self._record, self._run_id, self._key)
        self._write(run.run_id)
        run.set_tags({STUDY_TAG: self._record.name})
        return run

    def _adopt(self, parent: MlflowRun) -> None:
        """Make the runs of the study, which were created without it, children of `parent`."""
        query = f"tags.`{STUDY_TAG}` = '{self._record.name}'"
        for found in parent.client.search_runs([parent.experiment_id], query):
            if found.data.tags.get(KEY_TAG) != self._key:
                parent.client.set_tag(found.info.run_id, PARENT_TAG, parent.run_id)

    def _write(self, run_id: str | None) -> None:
        write_text_atomically(self._file, json.dumps({"run_id": run_id, "key": self._key}) + "\n")
