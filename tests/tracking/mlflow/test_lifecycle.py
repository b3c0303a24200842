"""Whatever happens to a tracker while a run is trained: one line, no training stopped, and everything there once.

A real server behind a gate that answers in its place, and a real database; see docs/tracking.md.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from resnet_dist.config import Recipe
from resnet_dist.runs.folder import RunFolder, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow import publisher as publishing
from resnet_dist.tracking.mlflow import upload
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry, Follower, Spool
from resnet_dist.tracking.store import STORE_FILE, URI_VARIABLE
from resnet_dist.tracking.sync import sync_runs
from resnet_dist.train.checkpoint.folder import list_checkpoints
from tests.paths import ROOT
from tests.tracking.mlflow.servers import LOGIN_PAGE, SOON, Gate, MlflowServer, wait_for

AWAY, BACK = "training does not wait for it", "the tracker answers again"
ANSWERS = {
    "it answers with a page": (200, LOGIN_PAGE),
    "it answers 500 Internal Server Error": (500, b"oops"),
    "it answers 401 Unauthorized": (401, b"You are not authenticated"),
    "it answers 403 Forbidden": (403, b"Permission denied"),
}


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Iterator[Gate]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / STORE_FILE)
    server = MlflowServer(folder, f"sqlite:///{folder / STORE_FILE}")
    server.start()
    with Gate(server.address).opened() as opened:
        yield opened
    server.kill()


@pytest.fixture
def client(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    gate.answer = lambda path: None
    monkeypatch.setenv(URI_VARIABLE, gate.address)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(upload, "MAX_BACKOFF_SECONDS", 0.2)
    monkeypatch.setattr(upload, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(upload, "SEND_SECONDS", 0.1)
    return mlflow.MlflowClient(gate.address)


class Publication:
    """A run that is published while its steps are logged one by one."""

    def __init__(self, run: RunFolder, recipe: Recipe, output: Path) -> None:
        self.run, self.notes, self.step = run, list[str](), 0
        self.publisher = MlflowPublisher(RunRecord(run, recipe, output), self._show)
        self.spool = Spool(run.spool)

    def _show(self, entry: Entry) -> None:
        self.notes += [entry.note] if entry.note else []

    def log(self) -> None:
        self.step += 1
        self.spool.log({"train/loss": 1 / self.step}, self.step)

    def count(self, text: str) -> int:
        return len([note for note in self.notes if text in note])

    def outage(self, reason: str, end: Callable[[], object]) -> None:
        """Log steps until the outage is reported with its reason, end it, and wait for the line about that."""
        away, back = self.count(AWAY), self.count(BACK)
        self.log()
        wait_for(lambda: self.count(AWAY) > away)
        assert reason in [note for note in self.notes if AWAY in note][-1]
        self.log()
        end()
        wait_for(lambda: self.count(BACK) > back)

    def end(self, checkpoint: str | None = None) -> tuple[str, ...]:
        self.spool.close()
        self.publisher.finish(SOON)
        self.publisher.log_results(checkpoint)
        self.publisher.close("FINISHED" if checkpoint else "KILLED", SOON)
        return self.publisher.unsent


def points(client: mlflow.MlflowClient, run_id: str | None) -> list[tuple[int, int, float]]:
    found = client.get_metric_history(str(run_id), "train/loss")
    return sorted((point.step, point.timestamp, point.value) for point in found)


def spooled(run: RunFolder) -> list[tuple[int, int, float]]:
    entries = [entry for entry in Follower(run.spool).read() if entry.metrics]
    return [(entry.step or 0, entry.time_ms, entry.metrics["train/loss"]) for entry in entries]


@pytest.fixture
def publication(
    trained: RunFolder, digits_recipe: Recipe, client: mlflow.MlflowClient, tmp_path: Path
) -> Publication:
    """Return a run of a name and key of its own, which is published."""
    name = tmp_path.name
    run = replace(
        trained,
        storage=open_storage(tmp_path / "output/runs" / name),
        name=name,
        key=name,
        tracker=os.environ[URI_VARIABLE],
    )
    shutil.copytree(trained.checkpoints.location, run.checkpoints.location)
    recipe = digits_recipe.with_overrides([f"experiment={name}"])
    return Publication(run, recipe, tmp_path / "output")


@pytest.mark.long
def test_whatever_stands_before_the_server_answers(
    publication: Publication, client: mlflow.MlflowClient, gate: Gate
) -> None:
    for reason, answer in ANSWERS.items():
        gate.answer = lambda path, answer=answer: answer  # type: ignore[misc]
        publication.outage(reason, lambda: setattr(gate, "answer", lambda path: None))
    assert publication.end() == ()
    assert points(client, publication.publisher.run_id) == spooled(publication.run)
    assert publication.count(AWAY) == publication.count(BACK) == len(ANSWERS)


@pytest.mark.long
def test_a_run_and_an_experiment_that_are_deleted_meanwhile(
    publication: Publication, client: mlflow.MlflowClient
) -> None:
    publication.log()
    wait_for(lambda: publication.publisher.run_id and points(client, publication.publisher.run_id))
    first = str(publication.publisher.run_id)
    client.delete_run(first)
    publication.log()
    wait_for(lambda: publication.publisher.run_id not in (None, first))
    assert publication.count("is no more at") == 1
    second = str(publication.publisher.run_id)
    wait_for(lambda: len(points(client, second)) == 2)
    experiment = client.get_run(second).info.experiment_id
    client.delete_experiment(experiment)
    name = publication.run.name
    publication.outage(
        f"the MLflow experiment {name!r} is deleted; restore it, or set another `experiment`",
        lambda: client.restore_experiment(experiment),
    )
    assert publication.end() == ()
    assert publication.publisher.run_id == second
    assert points(client, second) == spooled(publication.run)
    client.rename_experiment(experiment, f"{name} renamed")
    again = replace(publication.run, attempt=2, run_id=second)
    resumed = Publication(again, publication.publisher._record.recipe, publication.publisher._record.output)
    resumed.step = publication.step
    resumed.log()
    assert resumed.end() == ()
    assert resumed.publisher.run_id == second
    assert points(client, second) == spooled(publication.run)


@pytest.mark.long
def test_an_artifact_store_that_refuses_costs_files_alone(
    publication: Publication, client: mlflow.MlflowClient, gate: Gate
) -> None:
    gate.answer = lambda path: (403, b"Access Denied") if "mlflow-artifacts" in path else None
    publication.log()
    run = publication.run
    (newest,) = list_checkpoints(run.checkpoints)
    unsent = publication.end(newest)
    assert {"the recipe file", "the model"} >= set(unsent) >= {"the model"}
    assert publication.count("did not get") == 1
    assert "its artifact store is mlflow-artifacts:/" in next(
        note for note in publication.notes if "did not get" in note
    )
    assert points(client, publication.publisher.run_id) == spooled(run)
    replace(run, run_id=publication.publisher.run_id).ended("FINISHED", unsent).write()
    gate.answer = lambda path: None
    lines: list[str] = []
    for _ in range(2):
        assert sync_runs(publication.publisher._record.output, run.name, lines.append), lines
    assert "the model sent" in lines[0]
    found = client.get_run(str(publication.publisher.run_id))
    assert [one.step for one in found.outputs.model_outputs] == [2]
    assert points(client, found.info.run_id) == spooled(run)


@pytest.mark.long
def test_variables_of_another_job_and_a_slash_at_the_end(
    client: mlflow.MlflowClient, gate: Gate, digits_data: Path, tmp_path: Path
) -> None:
    """The recipe names the experiment, `--name` the run; a finished run of that name ends at once."""
    other = client.create_experiment(f"other {tmp_path.name}")
    other_run = client.create_run(other).info.run_id
    environment = {
        **os.environ,
        URI_VARIABLE: f"{gate.address}/",
        "MLFLOW_RUN_ID": other_run,
        "MLFLOW_EXPERIMENT_ID": other,
        "MLFLOW_EXPERIMENT_NAME": f"other {tmp_path.name}",
    }
    command = [
        sys.executable,
        "-m",
        "resnet_dist",
        "train",
        str(ROOT / "jobs/digits.py"),
        "--local",
        "--name",
        "a",
    ]
    command += ["--output", str(tmp_path / "output")]
    for override in (
        f"experiment={tmp_path.name}",
        "model.name=resnet8",
        "train.length=2 steps",
        "train.figures=none",
        f"data.train={digits_data}/train",
        f"data.eval={digits_data}/eval",
    ):
        command += ["--set", override]
    for _ in range(2):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=SOON, check=False
        )
        assert done.returncode == 0, done.stderr
        experiment = client.get_experiment_by_name(tmp_path.name)
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id])
        assert (found.info.run_name, found.info.status) == ("a", "FINISHED")
        assert [one.name for one in client.search_logged_models([experiment.experiment_id])] == ["model"]
    (untouched,) = client.search_runs([other])
    assert untouched.data.metrics == {}
    run = read_run(open_storage(tmp_path / "output/runs/a"))
    assert run is not None
    assert (run.tracker, run.unsent) == (gate.address, ())
    # The variable of `client` has no slash.
    assert sync_runs(tmp_path / "output", "a", lambda text: None)


@pytest.mark.long
def test_a_file_that_another_process_has_locked(
    output: Path, trained: RunFolder, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that takes long, or a person with the file open: at the start, and in the middle."""
    monkeypatch.setattr(publishing, "START_SECONDS_OF_FILE", 0.5)
    monkeypatch.setattr(upload, "MAX_BACKOFF_SECONDS", 0.2)
    monkeypatch.setattr(upload, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(upload, "SEND_SECONDS", 0.1)
    run = replace(trained, storage=open_storage(output / "runs/y"), name="y", key="y")
    with closing(sqlite3.connect(output / STORE_FILE, isolation_level=None)) as other:
        other.execute("begin exclusive")
        publication = Publication(run, digits_recipe, output)
        publication.log()
        wait_for(lambda: publication.count(AWAY))
        assert publication.publisher.run_id is None
        other.execute("rollback")
        wait_for(lambda: publication.count(BACK))
        other.execute("begin exclusive")
        publication.outage("another process keeps the database locked", lambda: other.execute("rollback"))
    assert publication.end() == ()
    client = mlflow.MlflowClient(f"sqlite:///{output}/{STORE_FILE}")
    assert points(client, publication.publisher.run_id) == spooled(run)
