"""The MLflow run on the embedded store: it is closed whatever fails, and failures are reported."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import mlflow
import pytest

from resnet_dist.config import Recipe, Study, Trial
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow import run as tracking_run
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.tracking.mlflow.study import STUDY_FILE, MlflowStudy
from resnet_dist.tracking.protocol import RunRecord, StudyRecord
from resnet_dist.tracking.store import URI_VARIABLE, tracking_uri


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one folder for all tests, because MLflow takes seconds to create a store."""
    return tmp_path_factory.mktemp("output")


@pytest.fixture(autouse=True)
def embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URI_VARIABLE, raising=False)


def runs(output: Path, key: str) -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri(output))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`{tracking_run.KEY_TAG}` = '{key}'"))


def opened(output: Path, recipe: Recipe, key: str) -> MlflowRun:
    return MlflowRun.open(record(output, recipe, key))


def record(output: Path, recipe: Recipe, key: str) -> RunRecord:
    run = RunFolder(open_storage(output / "runs/x"), "x", None, 1, recipe.model_dump(mode="json"), key=key)
    return RunRecord(run, recipe, "jobs/digits.py", output)


def test_a_tracker_that_was_never_started_closes_its_run(output: Path, digits_recipe: Recipe) -> None:
    """A signal may arrive after the tracker was opened and before it was started."""
    publisher = MlflowPublisher(record(output, digits_recipe, "never started"), lambda entry: None)
    assert publisher.finish(30) == 0
    publisher.close("KILLED", 30)
    (run,) = runs(output, "never started")
    assert run.info.status == "KILLED"


def test_a_user_without_a_name(output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 4711")

    monkeypatch.setattr(getpass, "getuser", nobody)
    run = opened(output, digits_recipe, "nobody")
    assert runs(output, "nobody")[0].data.tags["mlflow.user"].startswith("uid ")
    run.close("FINISHED", 30)


def test_a_run_that_cannot_be_described_is_refused_and_closed(
    output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "/artifacts")

    monkeypatch.setattr(mlflow.MlflowClient, "log_artifact", refuse)
    with pytest.raises(UserError, match="cannot be used: PermissionError.*/artifacts"):
        opened(output, digits_recipe, "refused")
    (run,) = runs(output, "refused")
    assert run.info.status == "FAILED"


def test_the_key_finds_the_run_of_a_driver_that_died(output: Path, digits_recipe: Recipe) -> None:
    first = opened(output, digits_recipe, "died")
    second = opened(output, digits_recipe, "died")
    assert second.run_id == first.run_id
    second.close("FINISHED", 30)


def test_closing_is_not_waited_for_forever(
    output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, end = opened(output, digits_recipe, "slow"), threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(mlflow.MlflowClient, "set_terminated", lambda *arguments: end.wait())
        with pytest.raises(TimeoutError, match="no answer within 0.01 s"):
            run.close("KILLED", 0.01)
        end.set()
    run.close("KILLED", 30)
    assert runs(output, "slow")[0].info.status == "KILLED"


def test_a_study_that_died_while_it_opened_resumes_its_run(output: Path, digits_recipe: Recipe) -> None:
    folder = output / "studies/s"

    trials = (Trial("t", digits_recipe, {"net": "plain"}),)
    study = Study("s", trials, "net", "net", 1, lambda results: "")

    def begin() -> MlflowStudy:
        return MlflowStudy(StudyRecord(study, "s", folder, "jobs/s.py", output))

    first = begin().member_tags()
    known = (folder / STUDY_FILE).read_text().replace(first[tracking_run.PARENT_TAG], "x")
    # The file has this state until MLflow has answered.
    (folder / STUDY_FILE).write_text(known.replace('"x"', "null"))
    second = begin()
    assert second.member_tags() == first
    second.close("FINISHED", "")


TELEMETRY_AT_IMPORT = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mlflow":
            print(os.environ.get("MLFLOW_DISABLE_TELEMETRY"))
            sys.exit()

sys.meta_path.insert(0, Finder())
import resnet_dist.tracking.mlflow.publisher
"""


def test_mlflow_sends_no_telemetry() -> None:
    """MLflow reads the variable when it is imported; `get_telemetry_client` would be None under pytest anyway."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    command = [sys.executable, "-c", TELEMETRY_AT_IMPORT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "true\n"
