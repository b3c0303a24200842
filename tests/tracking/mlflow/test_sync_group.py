"""The parent run of a study reaches MLflow too: with its runs, files, conclusion and status, at the end or by `sync`."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from resnet_dist.config import Recipe, Study, Trial
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.group_folder import FIGURE_FILE, STUDY_FILE, STUDY_TAG, GroupHeld, held, read_group
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow import group as publisher
from resnet_dist.tracking.mlflow.group import MlflowGroup
from resnet_dist.tracking.mlflow.run import PARENT_TAG
from resnet_dist.tracking.protocol import GroupRecord
from resnet_dist.tracking.store import URI_VARIABLE, tracking_uri
from tests.tracking.mlflow.servers import unused_address
from tests.tracking.mlflow.test_sync import synced


@pytest.fixture
def record(output: Path, digits_recipe: Recipe) -> GroupRecord:
    """Return the record of a study of one trial, which is in the experiment of `trained`."""
    recipe = digits_recipe.model_copy(update={"experiment": digits_recipe.name})
    study = Study("s", (Trial("x", recipe, {"net": "plain"}),), "net", "net", 1, lambda found: "", "Why.")
    return GroupRecord(study, "s", output / "studies/s", "jobs/s.py", output)


@pytest.fixture
def member(output: Path, trained: RunFolder) -> RunFolder:
    """Return the run of that study, which MLflow has not got."""
    shutil.move(output / "runs/x", output / "runs/s-x")
    place = open_storage(output / "runs/s-x")
    run = dataclasses.replace(trained, storage=place, name="s-x", tags={STUDY_TAG: "s"})
    run.write()
    return run


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let every call of the publisher of a study fail, as with a tracker that is down."""

    def fail(*arguments: object) -> None:
        raise ConnectionError("Connection refused")

    with monkeypatch.context() as patched:
        patched.setattr(publisher.MlflowRun, "open_parent", fail)
        patched.setattr(publisher.MlflowRun, "find_parent", fail)
        yield


def end_without_tracker(record: GroupRecord) -> MlflowGroup:
    """End the study of `record` with a figure, while the tracker is away."""
    study = MlflowGroup(record)
    figure = record.folder / FIGURE_FILE
    figure.write_bytes(b"png")
    study.log_files(figure)
    study.close("FINISHED", "it holds")
    return study


def runs_by_name(output: Path) -> dict[str, Any]:
    client = mlflow.MlflowClient(tracking_uri(output))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return {run.info.run_name: run for run in client.search_runs(experiments)}


@pytest.mark.usefixtures("member")
@pytest.mark.parametrize("name", [None, "s"])
def test_a_study_is_sent_with_its_runs(
    record: GroupRecord, output: Path, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(publisher, "within", no_answer)
        study = end_without_tracker(record)
    assert study.unsent == (FIGURE_FILE, "the conclusion", "the status")
    stored = read_group(record.folder)
    assert stored is not None
    assert (stored.status, stored.conclusion, stored.unsent) == ("FINISHED", "it holds", study.unsent)

    complete, lines = synced(output, name)
    assert complete, lines
    assert lines[1] == "study s: sent, closed as FINISHED, was RUNNING"
    assert lines[2:] == ([] if name else ["2 of 2 runs and studies are complete in MLflow"])
    found = runs_by_name(output)
    parent, child = found["s"], found["s-x"]
    assert child.data.tags[PARENT_TAG] == parent.info.run_id
    assert (parent.info.status, parent.data.tags["conclusion"]) == ("FINISHED", "it holds")
    assert parent.data.tags["mlflow.note.content"] == "Why."
    files = mlflow.MlflowClient(tracking_uri(output)).list_artifacts(parent.info.run_id)
    assert [file.path for file in files] == [FIGURE_FILE]
    # Again: nothing is sent twice, and nothing changes.
    assert synced(output, None) == (True, ["2 of 2 runs and studies are complete in MLflow"])
    assert synced(output, "s") == (True, ["study s: sent"])
    assert runs_by_name(output).keys() == {"s", "s-x"}
    again = read_group(record.folder)
    assert again is not None
    assert (again.run_id, again.unsent) == (parent.info.run_id, ())


def no_answer(seconds: float, call: object) -> None:
    raise TimeoutError(f"no answer within {seconds:g} s")


def test_the_study_of_a_dead_driver_is_closed(record: GroupRecord, output: Path) -> None:
    MlflowGroup(record)
    assert runs_by_name(output)["s"].info.status == "RUNNING"
    complete, lines = synced(output, None)
    assert (complete, lines[0]) == (True, "study s: sent, closed as KILLED, was RUNNING")
    assert runs_by_name(output)["s"].info.status == "KILLED"


def test_a_study_that_is_being_trained_is_left_alone(record: GroupRecord, output: Path) -> None:
    MlflowGroup(record)
    with held(record.folder):
        complete, lines = synced(output, None)
        assert (complete, lines[0]) == (
            False,
            "study s: is being trained by another process, which sends it",
        )
        with (
            pytest.raises(GroupHeld, match="study s is being trained by another process"),
            held(record.folder),
        ):
            pass
    assert runs_by_name(output)["s"].info.status == "RUNNING"


def test_what_the_tracker_does_not_take_is_counted_and_sent_later(
    record: GroupRecord, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "/srv/mlflow")

    study = MlflowGroup(record)
    (record.folder / FIGURE_FILE).write_bytes(b"png")
    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "log_artifact", full)
        study.log_files(record.folder / FIGURE_FILE)
        study.close("FINISHED", "it holds")
        assert study.unsent == (FIGURE_FILE,)
        complete, lines = synced(output, "s")
    assert not complete
    assert "did not get figure.png and the conclusion and the status of study s: PermissionError" in lines[0]
    assert synced(output, "s") == (True, ["study s: sent"])


@pytest.mark.parametrize("run_id", [None, "a"])
def test_the_study_of_an_earlier_version(output: Path, run_id: str | None) -> None:
    """It did not record its experiment and its end: one that MLflow has is left as it is, another one named."""
    folder = output / "studies/old"
    folder.mkdir(parents=True)
    (folder / STUDY_FILE).write_text(json.dumps({"run_id": run_id, "key": "k"}))
    complete, lines = synced(output, None)
    assert complete == (run_id is not None)
    assert len(lines) == (1 if run_id else 2)
    if not run_id:
        assert "study old: skipped; study old was begun by an earlier version" in lines[0]
    (folder / STUDY_FILE).write_text("[1]")
    with pytest.raises(UserError, match=r"study\.json: not a study"):
        read_group(folder)


@pytest.mark.usefixtures("away")
def test_a_study_of_another_tracker_and_one_that_is_away(
    record: GroupRecord, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = unused_address()
    monkeypatch.setenv(URI_VARIABLE, address)
    end_without_tracker(record)
    assert synced(output, "s") == (False, [f"study s: not sent; MLflow at {address}: connection refused"])
    monkeypatch.delenv(URI_VARIABLE)
    with pytest.raises(
        UserError, match=f"study s is kept in {address}, not in the store in the output folder"
    ):
        synced(output, "s")
