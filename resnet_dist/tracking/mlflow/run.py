"""The MLflow run: created or resumed, described, and closed on every way out of the training."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import mlflow
from mlflow.entities import Metric, Run
from mlflow.exceptions import MlflowException

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder, Status
from resnet_dist.runs.group_folder import GroupFolder
from resnet_dist.system.limit import within
from resnet_dist.system.redact import redact, redact_all
from resnet_dist.tracking.backlog import MAX_METRICS_PER_REQUEST, MetricPoint
from resnet_dist.tracking.logged_run import FOLDER_TAG, KEY_TAG
from resnet_dist.tracking.mlflow import values
from resnet_dist.tracking.mlflow.browse.links import run_link
from resnet_dist.tracking.mlflow.database.connect import connect, identity
from resnet_dist.tracking.mlflow.database.relocate import relocate
from resnet_dist.tracking.mlflow.failure import explain
from resnet_dist.tracking.mlflow.page.lineage import lineage_tags
from resnet_dist.tracking.origin import NOTE_TAG, is_of_attempt, origin_tags
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.store import ARTIFACTS_FOLDER, sqlite_file, tracking_uri, without_password

log = logging.getLogger(__name__)

ATTEMPT_TAG, RESTART_TAG, MODEL_TAG, LAST_MODEL_TAG = (
    f"resnet_dist.{name}" for name in ("attempt", "restart", "model_step", "last_model_step")
)
CLOSE_SECONDS = 30.0
ABANDON_SECONDS = 5.0  # for closing a run that could not be described
PARENT_TAG = "mlflow.parentRunId"  # MLflow's page lists a run under the run with this id.


# The errors of a store that has the run no more, among other reasons for them.
GONE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "INVALID_STATE")


class RunGone(Exception):
    """The run, or the store that held it, was deleted or replaced: open it again, and send everything."""


@dataclass
class MlflowRun:
    """One run in MLflow.

    Every call goes through a client and a run id, so that no thread-local state is involved.
    """

    client: mlflow.MlflowClient
    uri: str
    output: Path
    experiment_id: str
    run_id: str
    was_deleted: bool = False  # The run that run.json names is gone; this one replaces it.
    file: tuple[int, int] | None = None  # the file of a SQLite store, see `identity`
    # Parameters, tags and metrics that the store does not take.
    refused: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, record: RunRecord) -> Self:
        """Create the run of `record`, or resume it, and set its parameters and tags.

        The key of the record finds the run of a driver that died before it could write the id down. Raises whatever
        the store's client raises, and UserError where the experiment is deleted.
        """
        opened = cls.find(record)
        opened.client.update_run(opened.run_id, status="RUNNING")
        with opened._closed_where_it_fails():
            opened.describe(record)
        return opened

    @classmethod
    def find(cls, record: RunRecord) -> Self:
        """Return the run of `record` as it is, or create it."""
        run, experiment = record.run, record.recipe.experiment or record.recipe.name
        return cls._find(record.output, experiment, run.name, run.run_id, run.key, record.start_ms)

    @classmethod
    def open_parent(cls, group: GroupFolder) -> Self:
        """Create or resume the parent run of a group, which has no metrics of its own.

        Other runs become its children by PARENT_TAG. Raises as `open` does.
        """
        run = cls.find_parent(group)
        run.client.update_run(run.run_id, status="RUNNING")
        with run._closed_where_it_fails():
            run.describe_group(group)
        return run

    @classmethod
    def find_parent(cls, group: GroupFolder) -> Self:
        """Return the parent run of a group as it is, or create it."""
        assert group.experiment is not None
        return cls._find(group.output, group.experiment, group.name, group.run_id, group.key, None)

    @classmethod
    def _find(
        cls, output: Path, experiment: str, name: str, run_id: str | None, key: str, start_ms: int | None
    ) -> Self:
        uri = tracking_uri(output)
        client = connect(uri)
        relocate(uri, output)
        found = _active(client, run_id) if run_id else None
        if found is None:
            experiment_id = _experiment(client, experiment, output, uri)
            found = _run_with_key(client, experiment_id, key)
        was_deleted = run_id is not None and (found is None or found.info.run_id != run_id)
        if found is None:
            found = client.create_run(experiment_id, start_time=start_ms, run_name=name, tags={KEY_TAG: key})
        info = found.info
        return cls(client, uri, output, info.experiment_id, info.run_id, was_deleted, identity(uri))

    @property
    def place(self) -> str:
        """The store, without a password, as messages name it."""
        return place_of(self.uri)

    @property
    def page(self) -> str:
        """The address of the run's page; empty where no server shows one."""
        if not self.uri.startswith(("http://", "https://")):
            return ""
        return run_link(without_password(self.uri), self.experiment_id, self.run_id)

    def describe(self, record: RunRecord) -> None:
        """Set the parameters and tags; those that the store does not take go to `refused`."""
        run = record.run
        # MLflow refuses a changed parameter: those of the first attempt stay.
        data = self.client.get_run(self.run_id).data
        known = data.params
        fields = record.recipe.public().flat()
        params = {key: value for key, value in fields.items() if key != "description" and key not in known}
        self.refused += _log_or_shorten(
            values.params_of(params),
            lambda batch: self.client.log_batch(self.run_id, params=batch, synchronous=True),
        )
        tags = {FOLDER_TAG: run.location, **attempt_tags(run), **redact_all(dict(record.tags))}
        self.set_tags({**tags, **lineage_tags(self.client, run.lineage, tags.get(NOTE_TAG, ""))})
        # Those of an earlier one.
        self.delete_tags([name for name in data.tags if is_of_attempt(name) and name not in tags])

    def describe_group(self, group: GroupFolder) -> None:
        self.set_tags({**origin_tags(group.source, group.description), group.kind.tag: group.name})

    def newest_steps(self) -> dict[str, int]:
        """Return the newest step of every metric in the store."""
        with self._noticing_deletion():
            names = self.client.get_run(self.run_id).data.metrics
            return {
                name: max(metric.step for metric in self.client.get_metric_history(self.run_id, name))
                for name in names
            }

    def log_metrics(self, metrics: Sequence[MetricPoint | Metric]) -> None:
        """Log at most MAX_METRICS_PER_REQUEST metrics; those that the store does not take go to `refused`.

        Raises RunGone where the run was deleted or its store replaced.
        """

        def log_batch(batch: list[Metric]) -> None:
            with self._noticing_deletion():
                self.client.log_batch(self.run_id, metrics=batch, synchronous=True)

        points = [one if isinstance(one, Metric) else Metric(**vars(one)) for one in metrics]
        refused = values.log_each(points, MAX_METRICS_PER_REQUEST, log_batch)
        self.refused += [f"{metric.key} of step {metric.step}" for metric in refused]

    def set_tags(self, tags: dict[str, str]) -> None:
        self.refused += _log_or_shorten(
            values.tags_of(tags),
            lambda batch: self.client.log_batch(self.run_id, tags=batch, synchronous=True),
        )

    def delete_tags(self, names: Collection[str]) -> None:
        """Delete tags; those that the run does not have are passed over."""
        if names:
            for name in self.client.get_run(self.run_id).data.tags.keys() & set(names):
                self.client.delete_tag(self.run_id, name)

    def log_text(self, text: str, name: str) -> None:
        """Log a text as an artifact."""
        self.log_files({name: text.encode(errors="backslashreplace")})

    def log_files(self, contents: Mapping[str, bytes]) -> None:
        """Log files as artifacts, by their paths; files that are there already are replaced."""
        if not contents:
            return
        relocate(self.uri, self.output)
        with tempfile.TemporaryDirectory() as folder:
            for name, content in contents.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.client.log_artifacts(self.run_id, folder)

    def is_gone(self) -> bool:
        """Report whether the run was deleted or its store replaced; false where the store does not answer."""
        if identity(self.uri) != self.file:
            return True
        try:
            return _active(self.client, self.run_id) is None
        except Exception:  # An outage: the caller retries.
            return False

    def status(self) -> str:
        return str(self.client.get_run(self.run_id).info.status)

    def close(self, status: Status, timeout_seconds: float, end_ms: int | None = None) -> None:
        """Set the final status.

        Raises TimeoutError where the server has not answered by then; it may still close the run.
        """
        within(timeout_seconds, lambda: self.client.set_terminated(self.run_id, status, end_ms))

    @contextmanager
    def _noticing_deletion(self) -> Iterator[None]:
        # A connection to a removed file would take everything in silence.
        if identity(self.uri) != self.file:
            raise RunGone(f"{self.place} was removed or replaced")
        try:
            yield
        except MlflowException as error:
            if error.error_code not in GONE or not self.is_gone():
                raise
            raise RunGone(f"the run was deleted at {self.place}") from error

    @contextmanager
    def _closed_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with warn_on_error("the MLflow run could not be closed as FAILED", self.uri):
                self.close("FAILED", ABANDON_SECONDS)
            raise


def attempt_tags(run: RunFolder) -> dict[str, str]:
    """Return the tags with the number of the attempt, and with cause, step and seconds of each restart."""
    restarts = {f"{RESTART_TAG}.{one.attempt}": str(one) for one in run.restarts}
    return {ATTEMPT_TAG: str(run.attempt), **restarts}


def place_of(uri: str) -> str:
    """Return a store as messages name it."""
    file = sqlite_file(uri)
    return f"MLflow in {file}" if file is not None else f"MLflow at {redact(uri)}"


def _active(client: mlflow.MlflowClient, run_id: str) -> Run | None:
    """Return the run; None where the store does not have it, or has it as deleted."""
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _run_with_key(client: mlflow.MlflowClient, experiment_id: str, key: str) -> Run | None:
    query = f"tags.`{KEY_TAG}` = '{key}'"
    found = client.search_runs([experiment_id], query, max_results=1, order_by=["start_time DESC"])
    return found[0] if found else None


def _experiment(client: mlflow.MlflowClient, name: str, output: Path, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # A server has its own place for artifacts; a database would put them into the working folder.
        local = output.absolute() / ARTIFACTS_FOLDER / values.folder_of(name)
        location = local.as_uri() if sqlite_file(uri) is not None else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)  # Another run has created it at the same moment.
    if found is None or found.lifecycle_stage == "deleted":
        raise UserError(
            f"the MLflow experiment {values.cut(name, 100)!r} is deleted; restore it, or set another `experiment`"
        )
    return str(found.experiment_id)


def _log_or_shorten(items: Sequence[Any], log_batch: Callable[[list[Any]], None]) -> list[str]:
    """Log parameters or tags, shorter ones where the store refuses them; return the keys that it refuses still."""
    refused = values.log_each(items, values.MAX_PER_REQUEST, log_batch)
    again = values.log_each([values.shorter(item) for item in refused], 1, log_batch)
    return [item.key for item in again]


@contextmanager
def warn_on_error(consequence: str, uri: str) -> Iterator[None]:
    """Log an error as a warning that begins with `consequence`: a finished training must not fail by it."""
    try:
        yield
    except Exception as error:
        log.warning("%s (%s)", consequence, explain(error, uri).reason)
