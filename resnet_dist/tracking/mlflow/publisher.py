"""The publisher of a run in MLflow: the run itself, and the threads that show its spool and send it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.folder import RunFolder, Status
from resnet_dist.tracking.console import SpoolThread
from resnet_dist.tracking.mlflow.failure import Failure, explain
from resnet_dist.tracking.mlflow.logged.reference import CheckpointModels
from resnet_dist.tracking.mlflow.page.inputs import log_page
from resnet_dist.tracking.mlflow.results import log_recipe, publish_results, results_of
from resnet_dist.tracking.mlflow.run import MlflowRun, attempt_tags, place_of
from resnet_dist.tracking.mlflow.upload import Uploader
from resnet_dist.tracking.origin import NOTE_TAG
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry
from resnet_dist.tracking.store import sqlite_file, tracking_uri

# A server that has not answered by then gets its run later. A file is waited for longer: it is created, or locked by
# other runs that begin.
START_SECONDS, START_SECONDS_OF_FILE = 10.0, 60.0
RECIPE_SECONDS = 3.0  # for the upload of the recipe, which began with the run


class MlflowPublisher:
    """The MLflow run of a record: opened before the ranks start, or by the uploader when the store answers.

    Raises UserError for a person's mistake, such as a wrong password, where the run is new. A run that goes on is not
    stopped by it: a token that expires in the night must not cost the night.
    """

    def __init__(self, record: RunRecord, on_entry: Callable[[Entry], None]) -> None:
        self._record = replace(record, start_ms=_now_ms())
        self._uri = tracking_uri(record.output)
        self._report: Callable[[str], None] = lambda text: on_entry(Entry(_now_ms(), note=text))
        self._failure = Failure("", is_mistake=False)
        self._unsent: list[str] = []
        self._page = ""  # of the run, where a server shows one
        self._recipe_thread: threading.Thread | None = None
        self._recipe_error: Exception | None = None
        self._show = SpoolThread(record.run.spool, on_entry)
        self._models = CheckpointModels(record.run.location) if record.recipe.train.log_checkpoints else None
        self._uploader = Uploader(
            record.run.spool, self._open, self._explain, self._report, self._may_send, self._models
        )
        self._uploader.start()
        self._wait_for_run()

    @property
    def run_id(self) -> str | None:
        run = self._uploader.store
        return run.run_id if run is not None else None

    @property
    def unsent(self) -> tuple[str, ...]:
        return tuple(self._unsent)

    def num_waiting(self) -> int:
        return self._uploader.num_waiting()

    def start(self) -> None:
        self._show.start()

    def describe_attempt(self, run: RunFolder) -> None:
        # The description was sent when the run was opened, with a link that the tags of the folder do not have.
        tags = {name: text for name, text in run.tags.items() if name != NOTE_TAG}
        self._uploader.set_tags({**tags, **attempt_tags(run)})

    def finish(self, timeout_seconds: float) -> None:
        self._show.finish(timeout_seconds)
        try:
            num_unsent = self._uploader.finish(timeout_seconds)
        except StorageError as error:  # The metrics are there, but cannot be read now.
            self._unsent.append("the newest metrics")
            self._report(str(error))
        else:
            self._unsent += [f"{num_unsent:,} metrics"] if num_unsent else []
            if self._models:
                self._unsent.append(f"{len(self._models):,} checkpoints")
        if self._uploader.store is None:
            self._unsent.append("the parameters")
        elif self._uploader.has_tags:
            self._unsent.append("the newest tags")

    def log_results(self, checkpoint: str | None) -> None:
        run = self._uploader.store
        if run is None or self._unsent:  # A store that takes no metrics would only be waited for.
            self._unsent += results_of(self._record) if checkpoint is not None else []
            return
        recipe_logged = self._has_logged_recipe()
        self._unsent += publish_results(
            run, self._record, checkpoint, self._report, recipe_logged=recipe_logged
        )

    def close(self, status: Status, timeout_seconds: float) -> None:
        run = self._uploader.store
        if run is None:
            self._unsent.append("the status")
            return
        if run.refused:
            self._unsent.append(f"{len(run.refused)} values that it does not take")
            self._report(
                f"{run.place} does not take {', '.join(run.refused[:5])}; {self._record.run.location} has all"
            )
        try:
            run.close(status, timeout_seconds)
        except Exception as error:  # Training is over; `sync` closes the run.
            self._unsent.append("the status")
            self._report(
                f"{run.place}: the run could not be closed as {status} ({explain(error, self._uri).reason})"
            )

    def abandon(self) -> None:
        self._uploader.stop()
        self._show.finish(0)

    def _may_send(self) -> bool:
        """Report whether this driver holds the run still: after a pause of this process another one may send it."""
        try:
            self._record.run.check_lease()
        except StorageError:
            return False
        return True

    def _wait_for_run(self) -> None:
        """Wait a while for the run in MLflow. Raises UserError where a new run cannot have one, and a person must act."""
        seconds = START_SECONDS if sqlite_file(self._uri) is None else START_SECONDS_OF_FILE
        if not self._uploader.has_tried.wait(seconds):
            self._uploader.report_down(f"{place_of(self._uri)} has not answered within {seconds:g} s")
        elif self._uploader.first_error is not None:
            reason = f"{place_of(self._uri)}: {self._failure.reason}"
            if self._failure.is_mistake and self._record.run.attempt == 1:
                self._uploader.stop()
                raise UserError(reason)
            self._uploader.report_down(reason)

    def _open(self) -> MlflowRun:
        run = MlflowRun.open(self._record)
        if run.was_deleted:
            self._report(
                f"run {self._record.run.name} is no more at {run.place}: a new one gets all its metrics there"
            )
        if run.page and run.page != self._page:  # The connection may be opened again.
            self._page = run.page
            self._report(f"MLflow: {run.page}")
        # The record finds this run from here on, also when a connection is lost and opened again.
        self._record = replace(self._record, run=self._record.run.with_run_id(run.run_id))
        # In a thread of its own: an artifact store that does not answer must not hold up the metrics.
        self._recipe_error = None
        self._recipe_thread = threading.Thread(
            target=self._log_recipe, args=(run,), name="recipe", daemon=True
        )
        self._recipe_thread.start()
        return run

    def _log_recipe(self, run: MlflowRun) -> None:
        try:
            log_recipe(run, self._record.recipe)
            log_page(run, self._record.run)
        except Exception as error:  # It is tried again with the results, and counted there.
            self._recipe_error = error

    def _has_logged_recipe(self) -> bool:
        if self._recipe_thread is None:
            return False
        self._recipe_thread.join(RECIPE_SECONDS)
        return not self._recipe_thread.is_alive() and self._recipe_error is None

    def _explain(self, error: BaseException) -> str:
        if isinstance(error, StorageError):  # The spool cannot be read.
            return str(error)
        self._failure = explain(error, self._uri)
        return f"{place_of(self._uri)}: {self._failure.reason}"


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
