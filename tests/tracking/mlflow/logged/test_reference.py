"""Every checkpoint is a model of its run, ranked by its own metrics: once, whatever happens to tracker and driver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from resnet_dist.config import Recipe
from resnet_dist.errors import UserError
from resnet_dist.predict.find import find_model
from resnet_dist.runs.folder import RunFolder, checkpoint_name, stored_recipe
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.mlflow import upload
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Spool
from resnet_dist.tracking.store import tracking_uri
from resnet_dist.tracking.sync import sync_runs
from resnet_dist.train.checkpoint.folder import best_or_newest
from resnet_dist.train.loop import train
from resnet_dist.world import World
from tests.cluster.hosts import wait_until

BEST_FIRST = [{"field_name": "metrics.eval/top1", "ascending": False}]


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(upload, "MAX_BACKOFF_SECONDS", 0.001)


@pytest.fixture
def record(output: Path, digits_recipe: Recipe) -> RunRecord:
    """Return a run that has not begun."""
    run = RunFolder(
        open_storage(output / "runs/x"), "x", None, 1, stored_recipe(digits_recipe), key="x", tracker=""
    )
    run.write()
    return RunRecord(run, digits_recipe, output)


def models(output: Path, **options: Any) -> list[Any]:
    client = mlflow.MlflowClient(tracking_uri(output))
    experiments = [one.experiment_id for one in client.search_experiments()]
    return list(client.search_logged_models(experiments, **options))


def newest_top1(output: Path) -> float | None:
    client = mlflow.MlflowClient(tracking_uri(output))
    experiments = [one.experiment_id for one in client.search_experiments()]
    return next((run.data.metrics.get("eval/top1") for run in client.search_runs(experiments)), None)


def write(record: RunRecord) -> None:
    """Write what rank 0 does: three checkpoints with their evaluations, of which the first is removed again."""
    with Spool(record.run.spool) as spool:
        for step, top1 in ((8, 0.25), (16, 0.75), (24, 0.5)):
            spool.log({"train/loss": 1 / step, "perf/images_per_second": 9.0}, step)
            spool.log({"eval/top1": top1, "eval/loss": 1.0}, step)
            spool.log_checkpoint(step, f"{step:064x}")
        spool.log_checkpoint(8, None)


def published(record: RunRecord) -> MlflowPublisher:
    publisher = MlflowPublisher(record, lambda entry: None)
    publisher.finish(60)
    publisher.close("KILLED", 30)
    return publisher


EXPECTED = [
    ("step-00000016", 16, 0.75, False),
    ("step-00000024", 24, 0.5, False),
    ("step-00000008", 8, 0.25, True),
]


def ranking(output: Path) -> list[tuple[str, int, float, bool]]:
    """Return name, step, top-1 and whether it was removed of all models, the best first."""
    found = []
    for model in models(output, order_by=BEST_FIRST):
        assert (str(model.status), model.model_type) == ("READY", "checkpoint")
        values = {metric.key: metric.value for metric in model.metrics}
        assert values.keys() == {"train/loss", "eval/top1", "eval/loss"}
        tags = model.tags
        step = int(tags["resnet_dist.checkpoint"])
        assert tags["resnet_dist.checkpoint.sha256"] == f"{step:064x}"
        assert (
            tags["resnet_dist.checkpoint.location"] == f"{output}/runs/x/checkpoints/{checkpoint_name(step)}"
        )
        is_removed = "resnet_dist.checkpoint.removed" in tags
        assert ("The run has removed it" if is_removed else "resnet-dist predict") in tags[
            "mlflow.note.content"
        ]
        found.append((model.name, step, values["eval/top1"], is_removed))
    return found


def outputs(output: Path) -> list[int]:
    client = mlflow.MlflowClient(tracking_uri(output))
    (found,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return sorted(one.step for one in found.outputs.model_outputs)


def test_checkpoints_are_ranked_by_their_own_metrics(output: Path, record: RunRecord) -> None:
    write(record)
    publisher = published(record)
    assert publisher.unsent == ()
    assert ranking(output) == EXPECTED
    assert outputs(output) == [8, 16, 24]
    # The next attempt changes nothing of them.
    published(replace(record, run=replace(record.run, attempt=2, run_id=publisher.run_id)))
    assert ranking(output) == EXPECTED
    assert outputs(output) == [8, 16, 24]


@pytest.mark.parametrize(
    "call", ["create_logged_model", "log_outputs", "finalize_logged_model", "set_logged_model_tags"]
)
def test_each_is_there_once_whichever_request_fails(
    output: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The request may have arrived, though its answer did not."""
    original: Callable[..., Any] = getattr(mlflow.MlflowClient, call)
    failures = iter([False, True, False, True])

    def fail(*arguments: object, **options: object) -> object:
        must_fail = next(failures, False)
        if must_fail and call == "create_logged_model":
            raise ConnectionError("it is away")
        answer = original(*arguments, **options)
        if must_fail:
            raise ConnectionError("the answer is lost")
        return answer

    monkeypatch.setattr(mlflow.MlflowClient, call, fail)
    write(record)
    publisher = published(record)
    assert publisher.unsent == ()
    with Spool(record.run.spool) as spool:  # The best one is removed while nobody looks.
        spool.log_checkpoint(16, None)
    published(replace(record, run=replace(record.run, attempt=2, run_id=publisher.run_id)))
    assert ranking(output) == [(*EXPECTED[0][:3], True), *EXPECTED[1:]]
    assert outputs(output) == [8, 16, 24]


def test_a_run_that_was_deleted_gets_them_again(output: Path, record: RunRecord) -> None:
    write(record)
    first = published(record)
    client = mlflow.MlflowClient(tracking_uri(output))
    client.delete_run(first.run_id)
    again = published(replace(record, run=replace(record.run, attempt=2, run_id=first.run_id)))
    assert sorted(one.source_run_id for one in models(output)) == sorted([first.run_id, again.run_id] * 3)


def test_a_server_without_models_misses_nothing_else(
    output: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    def unknown(*arguments: object, **options: object) -> None:
        raise MlflowException("Not Found", ENDPOINT_NOT_FOUND)

    for name in ("create_logged_model", "search_logged_models"):
        monkeypatch.setattr(mlflow.MlflowClient, name, unknown)
    write(record)
    assert published(record).unsent == ()


def test_those_that_a_tracker_did_not_get_are_counted(
    output: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(record)
    with monkeypatch.context() as patched:
        patched.setattr(upload, "FAILURES_TO_REPORT", 1)

        def away(*arguments: object, **options: object) -> None:
            raise ConnectionError("it is away")

        patched.setattr(mlflow.MlflowClient, "create_logged_model", away)
        publisher = MlflowPublisher(record, lambda entry: None)
        # All that the tracker takes is there; the rest would be waited for in vain.
        wait_until(lambda: newest_top1(output) == 0.5, 100, lambda: "the metrics did not arrive")
        publisher.finish(0.5)
        publisher.close("KILLED", 30)
    assert publisher.unsent == ("3 checkpoints",)


def test_a_recipe_may_leave_them_out(output: Path, record: RunRecord) -> None:
    write(record)
    published(replace(record, recipe=record.recipe.with_overrides(["train.log_checkpoints=false"])))
    assert models(output) == []


@pytest.mark.long
def test_sync_sends_them_and_the_models_of_the_end_are_whole(
    output: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train without a tracker, where the best checkpoint is not the last one."""
    recipe = digits_recipe.with_overrides(["train.best_metric=eval/top1", "train.eval_every=8 steps"])
    recipe = recipe.with_overrides(["train.keep_checkpoints=1", "optim.lr=0.02"])
    values = iter((0.5, 0.75, 0.25))
    from resnet_dist.train import loop

    evaluate = loop.evaluate
    monkeypatch.setattr(
        loop, "evaluate", lambda *arguments: {**evaluate(*arguments), "eval/top1": next(values)}
    )
    place = open_storage(output / "runs/x")
    run = RunFolder(place, "x", None, 1, stored_recipe(recipe), key="x", tracker="")
    run.write()
    with Spool(run.spool) as spool:
        train(recipe, place.location, World.single(), spool)
    assert best_or_newest(run.checkpoints) == checkpoint_name(16)
    run.ended("FINISHED", ["everything"]).write()
    lines: list[str] = []
    for _ in range(2):
        assert sync_runs(output, "x", lines.append), lines
        found = models(output, order_by=BEST_FIRST)
        assert [(one.name, one.tags["resnet_dist.checkpoint"]) for one in found] == [
            ("model", "16"),
            ("step-00000008", "8"),
            ("last", "24"),
        ]
        assert [bool(one.model_type) for one in found] == [False, True, False]
    run_id = found[0].source_run_id
    weights = {
        step: (output / "runs/x/checkpoints" / checkpoint_name(step) / "model.safetensors").read_bytes()
        for step in (16, 24)
    }
    assert (Path(find_model(run_id, str(output))) / "model.safetensors").read_bytes() == weights[16]
    last = Path(find_model(f"models:/{found[2].model_id}", str(output)))
    assert (last / "model.safetensors").read_bytes() == weights[24]
    with pytest.raises(UserError, match="its run has removed this checkpoint, of step 8"):
        find_model(f"models:/{found[1].model_id}", str(output))


def test_a_checkpoint_predicts_by_the_name_of_its_model(output: Path, record: RunRecord) -> None:
    write(record)
    published(record)
    (model,) = [one for one in models(output) if one.name == "step-00000016"]
    assert (
        find_model(f"models:/{model.model_id}", str(output)) == f"{output}/runs/x/checkpoints/step-00000016"
    )
