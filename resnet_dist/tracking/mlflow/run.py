"""The MLflow run: created or resumed, described, and closed on every way out of the training."""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import Status
from resnet_dist.system.provenance import (
    GIT_COMMIT_VARIABLE,
    SOURCE_VARIABLE,
    USER_VARIABLE,
    git_commit,
    user_name,
)
from resnet_dist.system.redact import redact, redact_all
from resnet_dist.tracking.protocol import RunRecord, StudyRecord
from resnet_dist.tracking.store import tracking_uri

log = logging.getLogger(__name__)

MAX_PARAMS_PER_REQUEST = 100  # MLflow's limit
KEY_TAG, FOLDER_TAG, ATTEMPT_TAG = (f"resnet_dist.{name}" for name in ("key", "folder", "attempt"))
CLOSE_SECONDS = 30.0
PARENT_TAG = "mlflow.parentRunId"  # MLflow's page lists a run under the run with this id.


@dataclass
class MlflowRun:
    """One run in MLflow.

    Every call goes through a client and a run id, so that no thread-local state is involved.
    """

    client: mlflow.MlflowClient
    uri: str
    experiment_id: str
    run_id: str

    @classmethod
    def open(cls, record: RunRecord) -> Self:
        """Create the run of `record`, or resume it, and set its parameters and tags.

        The key of the record finds the run of a driver that died before it could write the id down.
        Raises UserError where the store cannot be used.
        """
        run, experiment = record.run, record.recipe.experiment or record.recipe.name
        with _explained(tracking_uri(record.output)):
            opened = cls._begin(record.output, experiment, run.name, run.run_id, run.key)
            with opened._closed_where_it_fails():
                opened._describe(record.recipe, record.source)
                opened.set_tags(
                    {
                        FOLDER_TAG: run.location,
                        ATTEMPT_TAG: str(run.attempt),
                        **redact_all(dict(record.tags)),
                    }
                )
            return opened

    @classmethod
    def open_parent(cls, record: StudyRecord, run_id: str | None, key: str) -> Self:
        """Create or resume the run of a study, which has no metrics of its own.

        Other runs become its children by PARENT_TAG. Raises UserError where the store cannot be used.
        """
        with _explained(tracking_uri(record.output)):
            run = cls._begin(record.output, record.study.experiment, record.name, run_id, key)
            with run._closed_where_it_fails():
                run.set_tags(origin_tags(record.source, record.study.description))
            return run

    @classmethod
    def _begin(cls, output: Path, experiment: str, name: str, run_id: str | None, key: str) -> Self:
        uri = tracking_uri(output)
        client = mlflow.MlflowClient(uri)
        experiment_id = _experiment(client, experiment, output, uri)
        run_id = run_id or _run_with_key(client, experiment_id, key)
        if run_id is None:
            run_id = client.create_run(experiment_id, run_name=name, tags={KEY_TAG: key}).info.run_id
        else:
            client.update_run(run_id, status="RUNNING")
        return cls(client, uri, experiment_id, run_id)

    def newest_steps(self) -> dict[str, int]:
        """Return the newest step of every metric in the store."""
        names = self.client.get_run(self.run_id).data.metrics
        return {
            name: max(metric.step for metric in self.client.get_metric_history(self.run_id, name))
            for name in names
        }

    def log_metrics(self, metrics: list[Metric]) -> None:
        self.client.log_batch(self.run_id, metrics=metrics)

    def set_tags(self, tags: dict[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def close(self, status: Status, timeout_seconds: float) -> None:
        """Set the final status.

        Raises TimeoutError where the server has not answered by then; it may still close the run.
        """
        box: list[BaseException] = []

        def call() -> None:
            try:
                self.client.set_terminated(self.run_id, status)
            except BaseException as error:  # The caller's thread raises it again below.
                box.append(error)

        # Call from another thread: a server that never answers must not hold this one beyond its grace time.
        thread = threading.Thread(target=call, name="close", daemon=True)
        thread.start()
        thread.join(timeout_seconds)
        if box:
            raise box[0]
        if thread.is_alive():
            raise TimeoutError(f"no answer within {timeout_seconds:g} s")

    @contextmanager
    def _closed_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with warn_on_error("the MLflow run could not be closed as FAILED"):
                self.close("FAILED", CLOSE_SECONDS)
            raise

    def _describe(self, recipe: Recipe, source: str) -> None:
        # MLflow refuses a changed parameter: those of the first attempt stay.
        known = self.client.get_run(self.run_id).data.params
        recipe = recipe.public()
        flat = {key: value for key, value in recipe.flat().items() if key != "description"}
        params = [Param(key, value) for key, value in flat.items() if key not in known]
        for low in range(0, len(params), MAX_PARAMS_PER_REQUEST):
            self.client.log_batch(self.run_id, params=params[low : low + MAX_PARAMS_PER_REQUEST])
        self.set_tags(origin_tags(source, recipe.description))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "recipe.json"
            path.write_text(recipe.to_json())
            self.client.log_artifact(self.run_id, str(path))


def _run_with_key(client: mlflow.MlflowClient, experiment_id: str, key: str) -> str | None:
    found = client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    return str(found[0].info.run_id) if found else None


def _experiment(client: mlflow.MlflowClient, name: str, output: Path, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise UserError(
                f"the MLflow experiment {name!r} is deleted; restore it, or set another `experiment`"
            )
        return str(found.experiment_id)
    # A server has its own place for artifacts; the embedded store would put them into the working folder.
    local = (output.absolute() / "artifacts" / name).as_uri() if uri.startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=local))


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn any error into a UserError that names the store: its client or database may raise any type."""
    try:
        yield
    except UserError:
        raise
    except MlflowException as error:
        raise UserError(f"MLflow at {uri} cannot be used: {error}") from None
    except Exception as error:
        raise UserError(f"MLflow at {uri} cannot be used: {type(error).__name__}: {error}") from error


@contextmanager
def warn_on_error(consequence: str) -> Iterator[None]:
    """Log an error as a warning that begins with `consequence`: a finished training must not fail by it."""
    try:
        yield
    except Exception as error:
        log.warning("%s (%s: %s)", consequence, type(error).__name__, error)


def origin_tags(source: str, description: str) -> dict[str, str]:
    """Return the tags of user, source and commit, as MLflow's fluent functions set them for its page."""
    return {
        "mlflow.user": os.environ.get(USER_VARIABLE) or user_name(),
        "mlflow.source.name": os.environ.get(SOURCE_VARIABLE) or source,
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": redact(description.strip()),
        **_git_tags(Path(source).parent),
    }


def _git_tags(folder: Path) -> dict[str, str]:
    commit = os.environ.get(GIT_COMMIT_VARIABLE) or git_commit(folder)
    return {"mlflow.source.git.commit": commit} if commit else {}


def page_of(address: str, experiment_id: str) -> str:
    """Return the address of the page that lists an experiment's runs on an MLflow server."""
    # Without the parameter, the page opens in its GenAI mode, which has no charts of metrics.
    return f"{address}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
