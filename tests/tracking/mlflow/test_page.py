"""The page of a run: its data, figures, failures and machines are there, now or after `sync`, and once."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import mlflow
import pytest

from resnet_dist.config import Recipe
from resnet_dist.data.shards.index import read_index
from resnet_dist.driver.page import begin_page, record_failure
from resnet_dist.driver.request import Request
from resnet_dist.runs.folder import RunFolder, stored_recipe
from resnet_dist.runs.page import EVALUATIONS_FOLDER
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.system.provenance import GitState
from resnet_dist.tracking import origin
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Spool
from resnet_dist.tracking.store import STORE_FILE, URI_VARIABLE, tracking_uri
from resnet_dist.train.loop import train
from resnet_dist.world import World
from tests.tracking.mlflow.servers import unused_address
from tests.tracking.mlflow.test_sync import only_run, synced

DIFF = "+password = hunter2\n+lr = 0.2"


@pytest.fixture
def request_of_run(output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Request:
    monkeypatch.setattr(origin, "git_state", lambda folder: GitState("abc-dirty", "w/x", DIFF))
    changes = ["train.length=4 steps", "train.log_every=1 steps", "train.eval_every=2 steps"]
    recipe = digits_recipe.with_overrides([*changes, "train.figures=evaluations"])
    return Request(recipe, "jobs/digits.py", output, changes="optim.lr=0.2 (was 0.1)")


def begun(request: Request) -> RunFolder:
    place = open_storage(Path(request.output) / "runs/x")
    run = RunFolder(place, "x", None, 1, stored_recipe(request.recipe), key="x", tracker="")
    indexes = [read_index(location) for location in (request.recipe.data.train, request.recipe.data.eval)]
    made = begin_page(run, request, indexes)
    made.write()
    return made


def trained(request: Request) -> RunFolder:
    run = begun(request)
    with Spool(run.spool, evaluations=run.storage.at(EVALUATIONS_FOLDER)) as spool:
        train(request.recipe, run.location, World.single(), spool)
        start = {"attempt": 1, "seconds": 1.0, "tags": {"resnet_dist.machine.torch": "2.15"}}
        spool.log_start(start, 1, {}, None)
    ended = run.ended("FINISHED", ["everything"])
    ended.write()
    return ended


def artifacts(output: Path, run_id: str, folder: str = "") -> dict[str, int]:
    """Return the artifacts of a run with their sizes."""
    client, found = mlflow.MlflowClient(tracking_uri(output)), dict[str, int]()
    for entry in client.list_artifacts(run_id, folder):
        found |= artifacts(output, run_id, entry.path) if entry.is_dir else {entry.path: entry.file_size}
    return found


def inputs(run: Any) -> dict[str, Any]:
    return {
        next(tag.value for tag in one.tags if tag.key == "mlflow.data.context"): one.dataset
        for one in run.inputs.dataset_inputs
    }


def test_a_run_that_was_trained_without_a_tracker_has_all_of_its_page_after_sync(
    output: Path, request_of_run: Request
) -> None:
    trained(request_of_run)
    assert synced(output)[0]
    found = only_run(output)
    tags = found.data.tags
    assert tags["mlflow.source.git.branch"] == "w/x"
    assert tags["resnet_dist.git_dirty"] == "true"
    assert tags["resnet_dist.changes_from_file"] == "optim.lr=0.2 (was 0.1)"
    assert "model.name=resnet8" in tags["resnet_dist.not_default"]
    assert tags["resnet_dist.machine.torch"] == "2.15"
    assert tags["resnet_dist.figures"] == "2 4"
    sets = inputs(found)
    assert json.loads(sets["train"].profile) == {"num_samples": 1437, "num_classes": 10, "num_shards": ANY}
    assert json.loads(sets["eval"].profile)["num_samples"] == 360
    assert sets["train"].digest != sets["eval"].digest
    assert json.loads(sets["eval"].source)["uri"].endswith("/eval/index.json")
    files = artifacts(output, found.info.run_id)
    names = [
        f"{name}.{kind}" for name in ("confusions", "classes", "calibration") for kind in ("png", "json")
    ]
    for name in [
        *(f"figures/{name}" for name in ["curves.png", *names]),
        "figures/step-00000002/classes.json",
    ]:
        assert files[name] > 100, name
    assert {"recipe.json", "data.json", "data/train_index.json", "data/eval_index.json"} <= files.keys()
    diff = mlflow.artifacts.load_text(f"{found.info.artifact_uri}/code.diff")
    assert "lr = 0.2" in diff
    assert "hunter2" not in diff
    images = [name for name in files if name.startswith("images/")]
    assert {re.split(r"[+%]step[+%](\d+)", name)[1] for name in images} == {"2", "4"}
    numbers = mlflow.artifacts.load_dict(f"{found.info.artifact_uri}/figures/classes.json")
    hits = sum(row["samples"] * row["top1"] for row in numbers["classes"] if row["samples"])
    assert hits / 360 == pytest.approx(found.data.metrics["eval/top1"])
    # Once more, as where an answer was lost: no image and no input is there twice.
    (output / "runs/x/run.json").write_text(
        (output / "runs/x/run.json").read_text().replace('"unsent": []', '"unsent": ["the figures"]')
    )
    assert synced(output)[0]
    assert artifacts(output, found.info.run_id) == files
    assert len(only_run(output).inputs.dataset_inputs) == 2


def test_a_tracker_that_is_away_gets_the_page_later(
    output: Path, request_of_run: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of an attempt is a tag until the next attempt; its details are a file."""
    run = begun(request_of_run)
    try:
        raise RuntimeError("no more memory at http://anna:hush@host")
    except RuntimeError as error:
        failed = record_failure(run, error)
    store = output / STORE_FILE
    aside = shutil.move(store, output / "aside.db")
    with monkeypatch.context() as patched:
        patched.setenv(URI_VARIABLE, unused_address())
        away = MlflowPublisher(RunRecord(run, request_of_run.recipe, output), lambda entry: None)
        away.describe_attempt(failed)
        away.finish(0.1)
        away.log_results(None)
        away.close("FAILED", 0.1)
        assert away.unsent
    shutil.move(aside, store)
    failed.ended("FAILED", away.unsent).write()
    assert synced(output)[0]
    found = only_run(output)
    assert found.data.tags["resnet_dist.error"] == "RuntimeError: no more memory at http://***@host"
    text = mlflow.artifacts.load_text(f"{found.info.artifact_uri}/failures/attempt-0001.txt")
    assert "in test_a_tracker_that_is_away_gets_the_page_later" in text
    assert "hush" not in text
    assert inputs(found).keys() == {"train", "eval"}
    again = replace(run, attempt=2, run_id=found.info.run_id)
    MlflowRun.open(RunRecord(again, request_of_run.recipe, output))
    assert "resnet_dist.error" not in only_run(output).data.tags


def test_a_driver_that_died_early_leaves_the_data_to_sync(output: Path, request_of_run: Request) -> None:
    begun(request_of_run)
    synced(output)
    found = only_run(output)
    assert found.info.status == "KILLED"
    assert inputs(found).keys() == {"train", "eval"}
    assert "code.diff" in artifacts(output, found.info.run_id)
