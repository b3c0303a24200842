"""A tracker that cannot be used is explained in one sentence; a person's mistake is told from an outage."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow import publisher
from resnet_dist.tracking.mlflow.failure import MAX_REASON, explain
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry, Spool
from resnet_dist.tracking.store import URI_VARIABLE
from tests.tracking.mlflow.servers import LOGIN_PAGE, answering, silent, unused_address

OUTAGES = {
    "down": (lambda: nullcontext(unused_address()), "connection refused"),
    "500": (lambda: answering(500, b"oops"), "it answers 500 Internal Server Error"),
    "503": (lambda: answering(503, b"{}"), "it answers 503 Service Unavailable"),
    "404": (lambda: answering(404, LOGIN_PAGE), "it answers 404 Not Found"),
    "login page": (lambda: answering(200, LOGIN_PAGE), "it answers with a page"),
    "unknown host": (lambda: nullcontext("http://mlflow.invalid:5000"), "its host has no address"),
}
DENIALS = {
    "401": lambda: answering(401, b"You are not authenticated"),
    "403": lambda: answering(403, b'{"error_code": "PERMISSION_DENIED", "message": "Permission denied"}'),
    "401 of a proxy": lambda: answering(401, b'{"detail": "Unauthorized"}', "application/json"),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def error_of(uri: str) -> MlflowException:
    with pytest.raises(MlflowException) as raised:
        mlflow.MlflowClient(uri, uri).get_experiment_by_name("x")
    return raised.value


@pytest.mark.parametrize("name", OUTAGES)
def test_an_outage_is_no_mistake(name: str) -> None:
    server, reason = OUTAGES[name]
    with server() as uri:
        failure = explain(error_of(uri), uri)
    assert not failure.is_mistake
    assert failure.reason.startswith(reason)
    assert "<html" not in failure.reason


@pytest.mark.parametrize("name", DENIALS)
def test_a_denial_is_a_mistake_and_names_the_variables(name: str) -> None:
    with DENIALS[name]() as uri:
        failure = explain(error_of(uri), uri)
    assert failure.is_mistake
    assert failure.reason.startswith(f"it answers {name[:3]} ")
    for variable in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        assert variable in failure.reason


def test_a_reason_is_short_and_has_no_password() -> None:
    error = RuntimeError("cannot use postgresql://anna:hush@host/db " + "x" * 1000 + "\nmore")
    failure = explain(error, "postgresql://anna:hush@host/db")
    assert "hush" not in failure.reason
    assert len(failure.reason) < MAX_REASON + 30
    assert not failure.is_mistake
    denied = RuntimeError('FATAL: password authentication failed for user "anna"')
    assert explain(denied, "postgresql://anna:hush@host/db").is_mistake


def record(output: Path, recipe: Recipe, attempt: int) -> RunRecord:
    run = RunFolder(
        open_storage(output / "runs/x"), "x", None, attempt, recipe.model_dump(mode="json"), key="key"
    )
    return RunRecord(run, recipe, output)


def publish(record: RunRecord) -> tuple[MlflowPublisher, list[str]]:
    """Publish a run of two metrics; return its publisher, which has ended, and the notes for a person."""
    notes: list[str] = []

    def on_entry(entry: Entry) -> None:
        notes.extend([entry.note] if entry.note else [])

    opened = MlflowPublisher(record, on_entry)
    opened.start()
    with Spool(record.run.spool) as spool:
        spool.log({"train/loss": 1.0, "train/top1": 0.5}, 1)
    opened.finish(0.5)
    opened.log_results("step-00000001")
    opened.close("FINISHED", 0.5)
    return opened, notes


@pytest.mark.parametrize("name", ["down", "503", "login page"])
def test_a_tracker_that_is_away_stops_no_new_run(
    name: str, tmp_path: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, reason = OUTAGES[name]
    with server() as uri:
        monkeypatch.setenv(URI_VARIABLE, uri)
        opened, notes = publish(record(tmp_path, digits_recipe, 1))
    assert opened.run_id is None
    assert opened.unsent == ("2 metrics", "the parameters", "the model", "the status")
    assert notes == [
        f"MLflow at {uri}: {notes[0].split(': ', 1)[1].partition(';')[0]}; training does not wait for it, and the metrics "
        "are kept and sent later"
    ]
    assert reason in notes[0]


def test_a_server_that_never_answers_is_not_waited_for(
    tmp_path: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher, "START_SECONDS", 0.1)
    with silent() as uri:
        monkeypatch.setenv(URI_VARIABLE, uri)
        opened, notes = publish(record(tmp_path, digits_recipe, 1))
    assert opened.unsent == ("2 metrics", "the parameters", "the model", "the status")
    assert notes[0].startswith(
        f"MLflow at {uri} has not answered within 0.1 s; training does not wait for it"
    )


def test_a_denial_stops_a_new_run_and_no_other(
    tmp_path: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with answering(401) as uri:
        monkeypatch.setenv(URI_VARIABLE, uri)
        with pytest.raises(UserError, match="it answers 401 Unauthorized: set MLFLOW_TRACKING_USERNAME"):
            publish(record(tmp_path, digits_recipe, 1))
        opened, notes = publish(record(tmp_path, digits_recipe, 2))
    assert opened.unsent[0] == "2 metrics"
    assert "401 Unauthorized" in notes[0]
