"""The driver with a bucket, and with ranks that write elsewhere: never FINISHED without results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.driver import launcher as launchers
from resnet_dist.driver import run as driver_run
from resnet_dist.driver.request import Request, Summary
from resnet_dist.driver.run import run_training
from resnet_dist.errors import TrainingError, UserError
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.console import ConsolePublisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry, Follower
from resnet_dist.train.loop import Outcome
from tests.driver.test_interrupts import SignallingPublisher
from tests.paths import ROOT
from tests.reporter import RecordingReporter
from tests.s3_server import S3Server


def train(
    recipe: Recipe, output: Path | str, open_publisher: Callable[..., Any], reporter: Any = None
) -> Summary:
    request = Request(recipe, "jobs/digits.py", output, gpu=False, local=True, name="x")
    return run_training(request, reporter or RecordingReporter(), open_publisher)


@pytest.mark.parametrize("missing", ["checkpoint and no metrics", "metrics"])
def test_ranks_that_wrote_elsewhere_are_not_finished(
    digits_recipe: Recipe, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launcher(*arguments: object, **options: object) -> Callable[..., Outcome]:
        def launch(run: Any) -> Outcome:
            if missing == "metrics":
                (tmp_path / "runs/x/checkpoints/step-00000024").mkdir(parents=True)
            return Outcome(24, 24, {"train/loss": 0.1}, finished=True)

        return launch

    monkeypatch.setattr(launchers, "local_launcher", launcher)
    publisher = SignallingPublisher("nothing")
    with pytest.raises(
        TrainingError, match=rf"{tmp_path}/runs/x has no {missing} on .*; --output must be a folder"
    ):
        train(digits_recipe, tmp_path, lambda *arguments: publisher)
    assert publisher.calls[-1] == "close FAILED"


@pytest.mark.parametrize("is_refused", [False, True])
def test_what_a_removal_left_goes_when_the_run_is_finished(
    digits_recipe: Recipe, s3: S3Server, monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    """No later start may come to do it. What the store refuses is reported: the results are whole."""
    left = "step-00000012/model.safetensors"

    def launch(run: RunFolder) -> Outcome:
        run.checkpoints.write("step-00000024/checkpoint.json", b"{}")
        run.checkpoints.write(left, b"weights")
        if is_refused:
            s3.proxy.fault = lambda method, path: "AccessDenied" if path.endswith("?delete") else None
        return Outcome(24, 24, {}, finished=True)

    monkeypatch.setattr(launchers, "local_launcher", lambda *arguments, **options: launch)
    monkeypatch.setattr(driver_run, "has_steps", lambda spool: True)
    output, reporter = f"s3://{s3.new_bucket()}/out", RecordingReporter()
    summary = train(digits_recipe, output, lambda *arguments: SignallingPublisher("nothing"), reporter)
    assert summary.run.status == "FINISHED"
    names = [found.name for found in summary.run.checkpoints.objects()]
    assert names == [*([left] if is_refused else []), "step-00000024/checkpoint.json"]
    assert any("parts of an unfinished checkpoint may stay" in note for note in reporter.notes) == is_refused


def test_a_run_in_a_bucket_from_the_data_to_the_model(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepare the data into the bucket, refuse a second driver while the first trains, and begin where it ended."""
    pytest.importorskip("s3fs", reason="needs s3fs to read the shards")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    output = f"s3://{s3.new_bucket()}/out"
    shorter = [
        "model.name=resnet8",
        "train.length=4 steps",
        "train.log_every=2 steps",
        f"data.shard_cache={tmp_path}/c",
    ]
    recipe = load_recipe(ROOT / "jobs/digits.py", shorter)
    refused: list[str] = []

    def open_publisher(record: RunRecord, on_entry: Callable[[Entry], None]) -> ConsolePublisher:
        assert record.output == tmp_path / "output"

        def compete() -> None:
            try:
                record.run.lock().__enter__()
            except UserError as error:
                refused.append(str(error))

        thread = threading.Thread(target=compete)
        thread.start()
        thread.join()
        return ConsolePublisher(record.run.spool, on_entry)

    reporter = RecordingReporter()
    summary = train(recipe, output, open_publisher, reporter)
    assert summary.outcome.finished
    assert summary.checkpoint == f"{output}/runs/x/checkpoints/step-00000004"
    assert f"preparing digits in {output}/data/digits" in reporter.notes
    assert any("MLFLOW_TRACKING_URI is not set: MLflow's store is" in line for line in reporter.notes)
    assert len(refused) == 1
    assert "run x is being trained by another process (" in refused[0]
    assert "; wait for its end, or give another --name" in refused[0]
    storage = open_storage(output)
    assert storage.at("data/digits").folders() == ["eval", "train"]
    steps = [
        entry.step for entry in Follower(storage.at("runs/x").log("spool.jsonl")).read() if entry.metrics
    ]
    assert steps == [2, 4, 4]
    assert storage.objects("runs/x/tokens") == []
    again = RecordingReporter()
    assert train(recipe, output, open_publisher, again).outcome.finished
    assert not any("preparing" in line for line in again.notes)
    assert "hush" not in "".join(again.notes + reporter.notes + refused)
    run_json = storage.read("runs/x/run.json")
    assert run_json is not None
    assert b"hush" not in run_json
    assert b'"attempt": 2' in run_json
    assert not list(tmp_path.glob("s3:*"))


def test_a_bucket_that_cannot_be_used_ends_before_anything_starts(
    digits_recipe: Recipe, s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no such bucket"):
        train(digits_recipe, "s3://nowhere/out", lambda *arguments: pytest.fail("opened"))
    s3.proxy.fault = lambda method, path: "AccessDenied"
    with pytest.raises(UserError, match="access is denied"):
        train(digits_recipe, f"s3://{s3.new_bucket()}/out", lambda *arguments: pytest.fail("opened"))
