"""The MLflow run: created, continued and closed by the driver, whatever way the training ends."""

from __future__ import annotations

import getpass
import logging
import os
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

# Before mlflow is imported: it reads these once. A server that is down shall fail in seconds, not in minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from resnet_dist.config import Recipe, UserError
from resnet_dist.runs import Status

log = logging.getLogger(__name__)

URI_VARIABLE = "MLFLOW_TRACKING_URI"
KEY_TAG = "resnet_dist.key"
CLOSE_SECONDS = 30.0
PARENT_TAG = "mlflow.parentRunId"  # MLflow's page folds runs under the one that this names
# Set for a submitted job, which runs as another user and without the repository around it.
GIT_COMMIT_VARIABLE, SOURCE_VARIABLE, USER_VARIABLE = (
    f"RESNET_DIST_{name}" for name in ("GIT_COMMIT", "SOURCE", "USER")
)


def tracking_uri(output: Path) -> str:
    """MLFLOW_TRACKING_URI, or the store embedded in the output folder."""
    return os.environ.get(URI_VARIABLE) or f"sqlite:///{output.absolute() / 'mlflow.db'}"


@dataclass
class MlflowRun:
    """One training history in MLflow. All calls go through a client with a run id: no thread-local state."""

    client: mlflow.MlflowClient
    uri: str
    experiment_id: str
    run_id: str

    @classmethod
    def open(cls, output: Path, recipe: Recipe, name: str, run_id: str | None, source: str, key: str) -> Self:
        """Create the run `name`, or continue the one with `run_id`, with parameters and tags.

        `key` finds the run of a driver that died before it could note down the id.

        Raises UserError where the server cannot be reached.
        """
        with _explained(tracking_uri(output)):
            run = cls._begin(output, recipe.experiment or recipe.name, name, run_id, key)
            with run._closed_where_it_fails():
                run._describe(recipe, source)
            return run

    @classmethod
    def open_parent(
        cls,
        output: Path,
        experiment: str,
        name: str,
        run_id: str | None,
        source: str,
        key: str,
        description: str,
    ) -> Self:
        """Create or continue a run that trains nothing: others become its children by PARENT_TAG.

        Raises UserError where the server cannot be reached.
        """
        with _explained(tracking_uri(output)):
            run = cls._begin(output, experiment, name, run_id, key)
            with run._closed_where_it_fails():
                run.set_tags(_origin_tags(source, description))
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
        """The newest step of every metric that the store has."""
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
        """Raises TimeoutError where the server has not answered by then; it may have closed the run."""
        box: list[BaseException] = []

        def call() -> None:
            try:
                self.client.set_terminated(self.run_id, status)
            except BaseException as error:  # raised again below
                box.append(error)

        # A server that takes a request and never answers would hold this process beyond its grace time.
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
            with told("the MLflow run could not be closed as FAILED"):
                self.close("FAILED", CLOSE_SECONDS)
            raise

    def _describe(self, recipe: Recipe, source: str) -> None:
        known = self.client.get_run(
            self.run_id
        ).data.params  # a parameter cannot change: first attempt's stay
        flat = {key: value for key, value in recipe.flat().items() if key != "description"}
        params = [Param(key, value) for key, value in flat.items() if key not in known]
        for low in range(0, len(params), 100):  # MLflow's limit for one request
            self.client.log_batch(self.run_id, params=params[low : low + 100])
        self.set_tags(_origin_tags(source, recipe.description))
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
    # A server decides itself where artifacts go; the embedded store would put them in the working folder.
    local = (output.absolute() / "artifacts" / name).as_uri() if uri.startswith("sqlite:") else None
    return str(client.create_experiment(name, artifact_location=local))


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Any error there is the store's: its client, a database and an object store raise what they like."""
    try:
        yield
    except UserError:
        raise
    except MlflowException as error:
        raise UserError(f"MLflow at {uri} cannot be used: {error}") from None
    except Exception as error:
        raise UserError(f"MLflow at {uri} cannot be used: {type(error).__name__}: {error}") from error


@contextmanager
def told(what: str) -> Iterator[None]:
    """What fails inside costs a warning that begins with `what`: a training that went well stays one."""
    try:
        yield
    except Exception as error:
        log.warning("%s (%s: %s)", what, type(error).__name__, error)


def _origin_tags(source: str, description: str) -> dict[str, str]:
    """What MLflow's page shows of a run that was made without its fluent functions."""
    return {
        "mlflow.user": os.environ.get(USER_VARIABLE) or _user(),
        "mlflow.source.name": os.environ.get(SOURCE_VARIABLE) or source,
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": description.strip(),
        **_git_tags(Path(source).parent),
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return f"uid {os.getuid()}"


def _git_tags(folder: Path) -> dict[str, str]:
    commit = os.environ.get(GIT_COMMIT_VARIABLE) or git_commit(folder)
    return {"mlflow.source.git.commit": commit} if commit else {}


def git_commit(folder: Path) -> str | None:
    """The commit of the repository around `folder`, with -dirty where tracked files differ; None outside one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def page_of(address: str, experiment_id: str) -> str:
    """The address of an experiment's runs on an MLflow server."""
    # Without the parameter the page opens in its GenAI mode, which has no charts of training.
    return f"{address}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
