"""A run that MLflow did not get is sent later, once, with its first times; its model needs nothing of this machine."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import mlflow
import pytest
import yaml
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

from resnet_dist.cli.main import run_command
from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder, read_run, stored_recipe
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow.failure import Failure
from resnet_dist.tracking.mlflow.logged import write
from resnet_dist.tracking.mlflow.model import download_model
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Follower, Spool
from resnet_dist.tracking.store import STORE_FILE, URI_VARIABLE, tracking_uri
from resnet_dist.tracking.sync import sync_runs
from resnet_dist.train.loop import train
from resnet_dist.world import World
from tests.paths import list_checkpoints
from tests.s3_server import S3Server
from tests.tracking.mlflow.servers import unused_address


def synced(output: Path, name: str | None = "x") -> tuple[bool, list[str]]:
    lines: list[str] = []
    return sync_runs(output, name, lines.append), lines


def only_run(output: Path) -> Any:
    client = mlflow.MlflowClient(tracking_uri(output))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (found,) = client.search_runs(experiments)
    return found


def points(output: Path, run_id: str) -> list[tuple[str, int, int, float]]:
    client = mlflow.MlflowClient(tracking_uri(output))
    names = client.get_run(run_id).data.metrics
    return sorted(
        (p.key, p.step, p.timestamp, p.value)
        for name in names
        for p in client.get_metric_history(run_id, name)
    )


def spooled(run: RunFolder) -> list[tuple[str, int, int, float]]:
    entries = run_entries(run)
    return sorted((name, e.step, e.time_ms, value) for e in entries for name, value in e.metrics.items())


def run_entries(run: RunFolder) -> list[Any]:
    return Follower(run.spool).read()


def test_a_run_is_sent_once_with_its_times(output: Path, trained: RunFolder) -> None:
    complete, lines = synced(output)
    assert complete, lines
    expected = spooled(trained)
    assert lines == [f"run x: {len(expected)} metrics sent, closed as FINISHED, was RUNNING"]
    found = only_run(output)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "x")
    assert (found.data.params["model.name"], found.data.tags["by"]) == ("resnet8", "me")
    assert points(output, found.info.run_id) == expected
    assert found.info.start_time == run_entries(trained)[0].time_ms
    assert found.info.end_time == run_entries(trained)[-1].time_ms
    stored = read_run(trained.storage)
    assert stored is not None
    assert (stored.run_id, stored.unsent) == (found.info.run_id, ())
    # Again, by name and for all: nothing changes.
    assert synced(output) == (True, ["run x: nothing to send"])
    assert synced(output, None) == (True, ["1 of 1 runs are complete in MLflow"])
    assert points(output, found.info.run_id) == expected
    assert len(only_run(output).outputs.model_outputs) == 1


def test_the_model_names_nothing_of_this_machine(
    output: Path, trained: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = write.version
    monkeypatch.setattr(write, "version", lambda name: "2.9.1+cu130" if name == "torch" else old(name))
    monkeypatch.chdir(output.parent)
    for name in ("pyproject.toml", "uv.lock"):  # A folder of another project, where the command is typed
        Path(name).write_text("[project]\nname = 'other'\nversion = '1'\n")
    assert synced(output) == (True, [ANY])
    checkpoint = download_model(only_run(output).info.run_id, tracking_uri(output))
    assert (checkpoint / "model.safetensors").read_bytes() == (
        list_checkpoints(Path(trained.checkpoints.location))[-1] / "model.safetensors"
    ).read_bytes()
    folder = checkpoint.parent.parent
    assert "torch==2.9.1\n" in (folder / "requirements.txt").read_text()
    texts = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
    assert {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"} <= texts.keys()
    assert not {"pyproject.toml", "uv.lock"} & texts.keys()
    for text in texts.values():
        assert "+cu130" not in text
        assert str(output.parent) not in text
        assert "/tmp/" not in text
    flavor = yaml.safe_load(texts["MLmodel"])["flavors"]["python_function"]
    assert flavor["model_code_path"] == "serve.py"
    logged = mlflow.MlflowClient(tracking_uri(output)).search_logged_models(["1"])
    assert {metric.key for metric in logged[0].metrics} >= {"train/loss", "eval/top1"}


def test_a_server_without_logged_models_gets_an_artifact(
    output: Path, trained: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow 2 and Azure ML know no models apart from runs."""

    def unknown(*arguments: object, **options: object) -> None:
        raise MlflowException("Not Found", ENDPOINT_NOT_FOUND)

    for name in ("create_logged_model", "search_logged_models"):
        monkeypatch.setattr(mlflow.MlflowClient, name, unknown)
    assert synced(output) == (True, [ANY])
    checkpoint = download_model(only_run(output).info.run_id, tracking_uri(output))
    assert (checkpoint / "model.safetensors").exists()
    assert synced(output) == (True, ["run x: nothing to send"])


def test_an_artifact_store_that_cannot_be_reached_costs_the_model_alone(
    output: Path, trained: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_reach(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", "/srv/mlflow")

    with monkeypatch.context() as patched:
        for name in ("log_artifacts", "log_model_artifacts"):
            patched.setattr(mlflow.MlflowClient, name, out_of_reach)
        complete, lines = synced(output)
    assert not complete
    place = (output / "artifacts/digits").as_uri()
    assert lines[0].startswith(
        f"MLflow in {output / STORE_FILE} did not get the recipe file and the model: PermissionError: "
    )
    assert f"(its artifact store is {place}/" in lines[0]
    found = only_run(output)
    assert points(output, found.info.run_id) == spooled(trained)
    assert found.info.status == "FINISHED"
    stored = read_run(trained.storage)
    assert stored is not None
    assert stored.unsent == ("the recipe file", "the model")
    assert synced(output) == (True, ["run x: the model sent"])
    assert mlflow.artifacts.load_dict(f"{found.info.artifact_uri}/recipe.json")["name"] == "digits"
    assert len(mlflow.MlflowClient(tracking_uri(output)).search_logged_models(["1"])) == 1


def test_what_a_dead_driver_left_open_is_closed(
    output: Path, trained: RunFolder, digits_recipe: Recipe
) -> None:
    open_run = dataclasses.replace(trained, status=None, unsent=())
    publisher = MlflowPublisher(RunRecord(open_run, digits_recipe, output), lambda entry: None)
    open_run.write()
    publisher.finish(60)
    assert only_run(output).info.status == "RUNNING"
    complete, lines = synced(output, None)
    assert complete, lines
    assert lines == ["run x: closed as KILLED, was RUNNING", "1 of 1 runs are complete in MLflow"]
    assert only_run(output).info.status == "KILLED"


def test_a_run_that_is_being_trained_is_left_alone(output: Path, trained: RunFolder) -> None:
    with trained.lock():
        assert synced(output, None) == (
            False,
            [
                "run x: is being trained by another process, which sends it",
                "0 of 1 runs are complete in MLflow; left: run x",
            ],
        )


def test_a_tracker_that_is_away_is_reported(
    output: Path, trained: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = unused_address()
    monkeypatch.setenv(URI_VARIABLE, address)
    dataclasses.replace(trained, tracker=address).write()
    assert synced(output) == (False, [f"run x: not sent; MLflow at {address}: connection refused"])
    stored = read_run(trained.storage)
    assert stored is not None
    assert stored.unsent == ("everything",)


def test_a_run_does_not_go_to_another_tracker(
    output: Path, trained: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataclasses.replace(trained, tracker="http://mlflow:5000").write()
    with pytest.raises(
        UserError, match="kept in http://mlflow:5000, not in the store in the output folder; set MLFLOW"
    ):
        synced(output)


def test_runs_that_cannot_be_sent_are_skipped_by_name_and_the_others_sent(
    output: Path, trained: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run of another tracker, damaged, or in an experiment that is deleted costs no other run anything."""
    for name, change in {
        "a": {"tracker": "http://mlflow:5000"},
        "b": {"recipe": {**trained.recipe, "experiment": "gone"}},
        "z": {"tracker": "http://mlflow:5000", "unsent": ()},  # complete there
    }.items():
        place = open_storage(output / "runs" / name)
        dataclasses.replace(trained, storage=place, name=name, key=name, **change).write()
    client = mlflow.MlflowClient(tracking_uri(output))
    client.delete_experiment(client.create_experiment("gone"))
    (output / "runs/c").mkdir()
    (output / "runs/c/run.json").write_text("[")
    monkeypatch.setattr("sys.argv", ["resnet-dist", "sync", "--output", str(output)])
    assert run_command() == 1
    a, b, c, x, total = capsys.readouterr().out.splitlines()
    assert a.startswith(
        "run a: skipped; run a is kept in http://mlflow:5000, not in the store in the output folder;"
    )
    assert b.startswith("run b: skipped; the MLflow experiment 'gone' is deleted")
    assert c.startswith(f"run c: skipped; {output}/runs/c/run.json: not a run")
    assert x.endswith("closed as FINISHED, was RUNNING")
    assert total == "2 of 5 runs are complete in MLflow; left: run a, run b, run c"


def test_a_tracker_that_refuses_is_asked_once(
    output: Path, trained: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataclasses.replace(trained, storage=open_storage(output / "runs/y"), name="y").write()
    asked = []

    def refuse(record: RunRecord) -> None:
        asked.append(record.run.name)
        raise MlflowException("denied")

    monkeypatch.setattr("resnet_dist.tracking.mlflow.sync.MlflowRun.find", refuse)
    monkeypatch.setattr(
        "resnet_dist.tracking.mlflow.sync.explain",
        lambda error, uri: Failure("it answers 401", is_mistake=True),
    )
    with pytest.raises(UserError, match="it answers 401"):
        synced(output, None)
    assert asked == ["x"]


def test_an_unknown_run_is_a_mistake(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["resnet-dist", "sync", "nobody", "--output", str(output)])
    assert run_command() == 2
    assert f"error: {output}/runs: no run named nobody there" in capsys.readouterr().err


def test_a_moved_output_keeps_its_models(output: Path, trained: RunFolder) -> None:
    assert synced(output) == (True, [ANY])
    moved = output.parent / "moved"
    shutil.move(output, moved)
    assert synced(moved) == (True, ["run x: nothing to send"])
    assert (download_model(only_run(moved).info.run_id, tracking_uri(moved)) / "model.safetensors").exists()
    assert not output.exists()
    assert os.listdir(moved / "artifacts") == ["digits"]


def test_a_run_in_a_bucket_is_sent(
    s3: S3Server, output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's embedded store of a run at a URL lies in the working folder's output."""
    monkeypatch.setattr("resnet_dist.tracking.store.LOCAL_FOLDER", output)
    url = f"s3://{s3.new_bucket()}/team"
    recipe = digits_recipe.with_overrides(
        ["train.length=2 steps", "train.log_every=1 steps", "train.log_gradient_norms=true"]
    )
    place = open_storage(f"{url}/runs/x")
    run = RunFolder(place, "x", None, 1, stored_recipe(recipe), key="x", tracker="")
    run.write()
    with Spool(run.spool) as spool:
        train(recipe, place.location, World.single(), spool)
    run = run.ended("FINISHED", ["everything"])
    run.write()
    lines: list[str] = []
    assert sync_runs(url, None, lines.append), lines
    assert lines[-1] == "1 of 1 runs are complete in MLflow"
    found = only_run(output)
    assert (found.info.status, found.data.tags["resnet_dist.folder"]) == ("FINISHED", f"{url}/runs/x")
    assert points(output, found.info.run_id) == spooled(run)
    files = {path.name for path in download_model(found.info.run_id, tracking_uri(output)).iterdir()}
    assert "model.safetensors" in files
    stored = read_run(place)
    assert stored is not None
    assert (stored.run_id, stored.unsent, stored.status) == (found.info.run_id, (), "FINISHED")
