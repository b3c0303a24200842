"""A real MLflow server that is down when a run begins, comes, goes and comes again: everything arrives, once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver import publish
from resnet_dist.driver.request import Request
from resnet_dist.driver.run import run_training
from resnet_dist.runs.folder import RunFolder, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow import upload
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.open import open_publisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Follower, Spool
from resnet_dist.tracking.store import STORE_FILE, URI_VARIABLE
from resnet_dist.tracking.sync import sync_runs
from resnet_dist.train.checkpoint.folder import list_checkpoints
from tests.reporter import RecordingReporter
from tests.tracking.mlflow.servers import (
    SOON,
    MlflowServer,
    has_postgresql,
    postgresql_database,
    wait_for,
)

GONE, BACK = "MLflow at http", "the tracker answers again"


def outages(notes: list[str]) -> list[str]:
    """Return the notes about a server that has gone or is back, by their first words."""
    return [words for note in notes if (words := note.partition(":")[0]) in (GONE, BACK)]


@pytest.fixture(params=["file", "postgresql"])
def server(
    request: pytest.FixtureRequest, output: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MlflowServer]:
    """Yield a server that is not started, on the empty store of `output` or an empty database."""
    if request.param == "postgresql" and not has_postgresql():
        pytest.skip("needs PostgreSQL in /usr/lib/postgresql and the Python package psycopg2")
    with ExitStack() as stack:
        store = f"sqlite:///{output / STORE_FILE}"
        if request.param == "postgresql":
            store = stack.enter_context(postgresql_database())
        made = MlflowServer(output, store)
        monkeypatch.setenv(URI_VARIABLE, made.address)
        monkeypatch.setattr(upload, "MAX_BACKOFF_SECONDS", 0.5)
        stack.callback(made.kill)
        yield made


def check_points(server: MlflowServer, run: RunFolder, run_id: str) -> None:
    """Raise AssertionError unless the server has every value of the spool, with its time, once."""
    client, expected = mlflow.MlflowClient(server.address), dict[str, list[tuple[int, int, float]]]()
    for entry in Follower(run.spool).read():
        for key, value in entry.metrics.items():
            assert entry.step is not None
            expected.setdefault(key, []).append((entry.step, entry.time_ms, value))
    assert "train/loss" in expected
    for key, points in expected.items():
        found = [(p.step, p.timestamp, p.value) for p in client.get_metric_history(run_id, key)]
        assert sorted(found) == points, key


@pytest.mark.long
def test_a_server_that_comes_and_goes_gets_everything_once(
    server: MlflowServer, trained: RunFolder, digits_recipe: Recipe, tmp_path: Path
) -> None:
    notes: list[str] = []
    run = replace(trained, storage=open_storage(tmp_path / "runs/y"), name="y", key="y")
    shutil.copytree(trained.checkpoints.location, run.checkpoints.location)
    publisher = MlflowPublisher(
        RunRecord(run, digits_recipe, tmp_path),
        lambda entry: notes.extend([entry.note] if entry.note else []),
    )
    assert publisher.run_id is None
    with Spool(run.spool) as spool:
        spool.log({"train/loss": 3.0}, 1)
        server.start()
        wait_for(lambda: publisher.run_id is not None)
        spool.log({"train/loss": 2.0}, 2)
        client = mlflow.MlflowClient(server.address)
        wait_for(lambda: client.get_run(str(publisher.run_id)).data.metrics.get("train/loss") == 2.0)
        server.kill()
        spool.log({"train/loss": 1.0}, 3)
        wait_for(lambda: len(outages(notes)) == 3)
        server.start()
        spool.log({"train/loss": 0.5}, 4)
        wait_for(lambda: len(outages(notes)) == 4)
        publisher.finish(SOON)
    publisher.log_results(list_checkpoints(trained.checkpoints)[-1])
    publisher.close("FINISHED", SOON)
    assert publisher.unsent == ()
    assert outages(notes) == [GONE, BACK] * 2
    found = client.get_run(str(publisher.run_id))
    assert (found.info.status, found.data.params["model.name"]) == ("FINISHED", "resnet8")
    check_points(server, run, found.info.run_id)
    assert len(found.outputs.model_outputs) == 1
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["recipe.json"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_server_that_is_down_from_start_to_end_gets_everything_once(
    server: MlflowServer, digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LAST_UPLOAD_SECONDS", "CLOSE_SECONDS"):  # No server comes that is worth a wait.
        monkeypatch.setattr(publish, name, 1.0)
    place, reporter = tmp_path / "runs-of-it", RecordingReporter()
    request = Request(digits_recipe, "digits.py", place, gpu=False, local=True, name="y")
    summary = run_training(request, reporter, open_publisher)
    assert summary.outcome.finished
    assert summary.run.run_id is None
    assert any("metrics" in one for one in summary.run.unsent)
    assert outages(reporter.notes) == [GONE]
    server.start()
    assert sync_runs(place, "y", reporter.note)
    synced = read_run(summary.run.storage)
    assert synced is not None
    assert (synced.status, synced.unsent) == ("FINISHED", ())
    check_points(server, synced, str(synced.run_id))
    assert sync_runs(place, "y", reporter.note)  # Repeating it changes nothing.
    check_points(server, synced, str(synced.run_id))
    assert mlflow.MlflowClient(server.address).get_run(str(synced.run_id)).info.status == "FINISHED"
