"""The MLflow run on the embedded store: it is closed whatever fails, and failures are reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Metric

from resnet_dist.config import Recipe, Study, Trial
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import Restarted, RunFolder
from resnet_dist.runs.group_folder import STUDY_FILE
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow import run as tracking_run
from resnet_dist.tracking.mlflow.group import MlflowGroup
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.mlflow.run import MlflowRun, RunGone
from resnet_dist.tracking.protocol import GroupRecord, RunRecord
from resnet_dist.tracking.store import STORE_FILE, tracking_uri


def runs(output: Path, key: str) -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri(output))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.`{tracking_run.KEY_TAG}` = '{key}'"))


def opened(output: Path, recipe: Recipe, key: str) -> MlflowRun:
    return MlflowRun.open(record(output, recipe, key))


def record(output: Path, recipe: Recipe, key: str) -> RunRecord:
    run = RunFolder(open_storage(output / "runs/x"), "x", None, 1, recipe.model_dump(mode="json"), key=key)
    return RunRecord(run, recipe, output)


def resumed(before: RunRecord, run_id: str) -> RunRecord:
    return replace(before, run=replace(before.run, run_id=run_id, attempt=2))


def test_a_tracker_that_was_never_started_closes_its_run(output: Path, digits_recipe: Recipe) -> None:
    """A signal may arrive after the tracker was opened and before it was started."""
    publisher = MlflowPublisher(record(output, digits_recipe, "never started"), lambda entry: None)
    publisher.finish(30)
    publisher.close("KILLED", 30)
    (run,) = runs(output, "never started")
    assert run.info.status == "KILLED"
    assert publisher.unsent == ()


def test_restarts_are_tags_of_the_run(output: Path, digits_recipe: Recipe) -> None:
    made = record(output, digits_recipe, "restarted")
    publisher = MlflowPublisher(made, lambda entry: None)
    restart = Restarted(2, "rank 1 on h2 (10.0.0.2) was killed or crashed", 220)
    run = replace(made.run, attempt=2, restarts=(restart,))
    publisher.describe_attempt(run)
    publisher.describe_attempt(run.with_seconds({2: 31.2}))
    publisher.finish(30)
    publisher.close("FINISHED", 30)
    (found,) = runs(output, "restarted")
    assert found.data.tags["resnet_dist.attempt"] == "2"
    words = "rank 1 on h2 (10.0.0.2) was killed or crashed; resumed from step 220, 31 s"
    assert found.data.tags["resnet_dist.restart.2"] == words
    assert publisher.unsent == ()
    # The next command describes the run anew, from run.json.
    MlflowRun.open(replace(made, run=replace(run, attempt=3, run_id=found.info.run_id)))
    assert runs(output, "restarted")[0].data.tags["resnet_dist.attempt"] == "3"


def test_what_an_attempt_does_not_say_any_more_is_gone(output: Path, digits_recipe: Recipe) -> None:
    """A later attempt on a machine without a GPU, from a clean repository, and without `--set`."""
    made = record(output, digits_recipe, "stale")
    gone = {
        "resnet_dist.machine.gpu": "H100",
        "resnet_dist.changes_from_file": "optim.lr=0.2 (was 0.1)",
        "resnet_dist.ray_job": "job-1",
        "resnet_dist.git_diff": "not read",
        "mlflow.source.git.branch": "x",
        "resnet_dist.error": "it failed",
    }
    kept = {"resnet_dist.machine.hosts": "h1", "mlflow.source.git.commit": "abc", "by": "me"}
    first = MlflowRun.open(replace(made, run=replace(made.run, tags={**gone, **kept})))
    first.set_tags({"resnet_dist.model_step": "4", "mine": "a person's"})
    MlflowRun.open(replace(made, run=replace(made.run, run_id=first.run_id, attempt=2, tags=kept)))
    tags = runs(output, "stale")[0].data.tags
    assert not gone.keys() & tags.keys()
    assert {**kept, "resnet_dist.model_step": "4", "mine": "a person's"}.items() <= tags.items()
    assert "resnet_dist.folder" in tags


def test_a_run_that_cannot_be_described_is_closed(
    output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", refuse)
    with pytest.raises(PermissionError):
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

    def begin() -> MlflowGroup:
        return MlflowGroup(GroupRecord(study, "s", folder, "jobs/s.py", output))

    first = begin().member_tags()
    known = (folder / STUDY_FILE).read_text().replace(first[tracking_run.PARENT_TAG], "x")
    # The file has this state until MLflow has answered.
    (folder / STUDY_FILE).write_text(known.replace('"x"', "null"))
    second = begin()
    assert second.member_tags() == first
    second.close("FINISHED", "")


def test_a_deleted_run_is_replaced(output: Path, digits_recipe: Recipe) -> None:
    first = opened(output, digits_recipe, "deleted")
    first.log_metrics([Metric("train/loss", 1.0, 1, 1)])
    first.client.delete_run(first.run_id)
    with pytest.raises(RunGone):
        first.log_metrics([Metric("train/loss", 0.5, 2, 2)])
    again = MlflowRun.open(resumed(record(output, digits_recipe, "deleted"), first.run_id))
    assert again.was_deleted
    assert again.run_id != first.run_id
    assert again.newest_steps() == {}
    assert again.client.get_run(again.run_id).data.params["model.name"] == "resnet8"


def test_a_deleted_experiment_is_a_mistake(output: Path, digits_recipe: Recipe) -> None:
    first = opened(output, digits_recipe, "gone")
    first.client.delete_experiment(first.experiment_id)
    with pytest.raises(UserError, match="the MLflow experiment 'digits' is deleted; restore it"):
        MlflowRun.open(resumed(record(output, digits_recipe, "gone"), first.run_id))
    first.client.restore_experiment(first.experiment_id)
    assert MlflowRun.open(resumed(record(output, digits_recipe, "gone"), first.run_id)).run_id == first.run_id


def test_a_renamed_experiment_keeps_its_run(output: Path, digits_recipe: Recipe) -> None:
    first = opened(output, digits_recipe, "renamed")
    first.client.rename_experiment(first.experiment_id, "other")
    again = MlflowRun.open(resumed(record(output, digits_recipe, "renamed"), first.run_id))
    assert (again.run_id, again.experiment_id) == (first.run_id, first.experiment_id)


def test_a_store_that_is_replaced_while_it_is_used_gets_a_new_run(
    output: Path, empty_store: Path, digits_recipe: Recipe
) -> None:
    first = opened(output, digits_recipe, "replaced")
    (output / STORE_FILE).unlink()
    with pytest.raises(RunGone):  # The connection would take the metrics, and nobody could read them.
        first.log_metrics([Metric("train/loss", 1.0, 1, 1)])
    shutil.copy(empty_store, output / STORE_FILE)
    with pytest.raises(RunGone):
        first.newest_steps()
    again = opened(output, digits_recipe, "replaced")
    again.log_metrics([Metric("train/loss", 1.0, 1, 1)])
    assert [run.data.metrics for run in runs(output, "replaced")] == [{"train/loss": 1.0}]


def test_an_experiment_that_another_run_creates_at_the_same_moment(
    output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, answers = mlflow.MlflowClient.get_experiment_by_name, [True]

    def miss_once(client: mlflow.MlflowClient, name: str) -> object:
        if answers:
            answers.pop()
            client.create_experiment(name)
            return None
        return get(client, name)

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", miss_once)
    opened(output, digits_recipe, "race").close("FINISHED", 30)
    assert len(runs(output, "race")) == 1


@pytest.mark.parametrize("name", ["a/b", "../../up", "größe", "a b%c#d?e", "e" * 500])
def test_names_of_experiments(output: Path, digits_recipe: Recipe, name: str) -> None:
    run = opened(output, digits_recipe.with_overrides([f"experiment={name}"]), name[:20])
    run.log_text("hello", "note.txt")
    (folder,) = (output / "artifacts").iterdir()
    assert (folder / run.run_id / "artifacts/note.txt").read_text() == "hello"
    assert run.client.get_experiment(run.experiment_id).name == name


@pytest.mark.parametrize("truncate", ["true", "false"])
def test_long_values_are_cut(
    output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, truncate: str
) -> None:
    """MLflow cuts them by itself only while nobody has told it not to."""
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", truncate)
    milestones = [f"{step} steps" for step in range(1, 900)]
    recipe = digits_recipe.with_overrides(
        ["schedule.decay=step", f"schedule.milestones={json.dumps(milestones)}", "description=x"]
    )
    long = record(output, recipe, "long")
    long = replace(long, run=replace(long.run, tags={"mlflow.note.content": "ü" * 20_000}))
    for _ in range(2):  # A resumed run sends them again.
        run = MlflowRun.open(long)
        assert run.refused == []
    data = run.client.get_run(run.run_id).data
    assert (
        data.params["schedule.milestones"].startswith("['1 steps', ")
        or "1 steps" in data.params["schedule.milestones"]
    )
    assert len(data.params["schedule.milestones"]) == 6000
    assert data.tags["mlflow.note.content"] == "ü" * 7999 + "…"


def test_a_metric_that_mlflow_does_not_take_blocks_no_other(output: Path, digits_recipe: Recipe) -> None:
    run = opened(output, digits_recipe, "refuses")
    run.log_metrics([Metric(name, 1.0, 1, 1) for name in ("train/loss", "a\nb", "x" * 300, "train/top1")])
    assert run.newest_steps() == {"train/loss": 1, "train/top1": 1}
    assert run.refused == ["a\nb of step 1", f"{'x' * 300} of step 1"]


ENVIRONMENT_AT_IMPORT = """
import json, os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mlflow":
            print(json.dumps(dict(os.environ)))
            sys.exit()

sys.meta_path.insert(0, Finder())
import resnet_dist.tracking.mlflow.publisher
"""


def test_mlflow_begins_without_the_variables_of_another_job_and_without_telemetry() -> None:
    """MLflow reads them when it is imported; `get_telemetry_client` would be None under pytest anyway."""
    others = {
        "MLFLOW_RUN_ID": "0" * 32,
        "MLFLOW_RUN_NAME": "other",
        "MLFLOW_EXPERIMENT_ID": "77",
        "MLFLOW_EXPERIMENT_NAME": "other",
        "MLFLOW_ACTIVE_MODEL_ID": "m-" + "0" * 32,
        "MLFLOW_REGISTRY_URI": "http://127.0.0.1:1",
    }
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    command = [sys.executable, "-c", ENVIRONMENT_AT_IMPORT]
    done = subprocess.run(command, env=environment | others, capture_output=True, text=True, check=True)
    seen = json.loads(done.stdout)
    assert not others.keys() & seen.keys()
    assert seen["MLFLOW_DISABLE_TELEMETRY"] == "true"
    # A model would get uv.lock and pyproject.toml of the working folder.
    assert (seen["MLFLOW_UV_AUTO_DETECT"], seen["MLFLOW_LOG_UV_FILES"]) == ("false", "false")


def test_metrics_are_sent_at_once_whatever_the_environment_says(
    output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    run = opened(output, digits_recipe, "async")
    run.log_metrics([Metric("train/loss", 1.0, 1, 1)])
    assert run.newest_steps() == {"train/loss": 1}
