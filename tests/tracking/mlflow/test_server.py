"""A real MLflow server that is down when a run begins, comes, goes and comes again: everything arrives, once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from resnet_dist.config import Recipe
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow import upload
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry, Follower, Spool
from resnet_dist.tracking.store import URI_VARIABLE
from resnet_dist.train.checkpoint.folder import list_checkpoints
from tests.tracking.mlflow.mlflow_server import SOON, Server, wait_for

GONE, BACK = "MLflow at http", "the tracker answers again"


def outages(notes: list[str]) -> list[str]:
    """Return the notes about a server that has gone or is back, by their first words."""
    return [words for note in notes if (words := note.partition(":")[0]) in (GONE, BACK)]


@pytest.fixture
def server(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Yield a server that is not started; its store is the empty one of `output`."""
    made = Server(output)
    monkeypatch.setenv(URI_VARIABLE, made.address)
    monkeypatch.setattr(upload, "MAX_BACKOFF_SECONDS", 0.5)
    yield made
    made.kill()


@pytest.mark.long
def test_a_server_that_comes_and_goes_gets_everything_once(
    server: Server, trained: RunFolder, digits_recipe: Recipe, tmp_path: Path
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
    points = [
        (p.step, p.timestamp, p.value) for p in client.get_metric_history(found.info.run_id, "train/loss")
    ]
    entries: list[Entry] = Follower(run.spool).read()
    assert sorted(points) == [(e.step, e.time_ms, e.metrics["train/loss"]) for e in entries if e.metrics]
    assert len(found.outputs.model_outputs) == 1
    assert [file.path for file in client.list_artifacts(found.info.run_id)] == ["recipe.json"]
