"""Runs whose checkpoints and metrics lie in a bucket: damage, outages, and restarts cannot be seen afterwards."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from resnet_dist.config import Recipe
from resnet_dist.runs.folder import CHECKPOINTS_FOLDER, SPOOL_FILE
from resnet_dist.runs.storage import client
from resnet_dist.runs.storage.bucket import Bucket
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.spool import Follower, Spool
from resnet_dist.train import loop
from resnet_dist.train.checkpoint import writer
from resnet_dist.train.checkpoint.folder import (
    fetch_checkpoint,
    list_checkpoints,
    prune,
    read_newest,
    step_of,
    write_checkpoint,
)
from resnet_dist.train.checkpoint.load import load_model
from resnet_dist.train.checkpoint.writer import Checkpointer, CheckpointFailed
from resnet_dist.train.start.initial import initial_state
from resnet_dist.world import World
from tests.s3_server import S3Server, no_fault
from tests.train.runs import Recorder, run

WORLD = World.single()


@pytest.fixture
def url(s3: S3Server) -> str:
    return f"s3://{s3.new_bucket()}/runs/x"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let calls and checkpoints be given up soon."""
    monkeypatch.setattr(client, "SMALL_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(client, "LARGE_RETRY_SECONDS", 0.1)
    monkeypatch.setattr(writer, "RETRY_SECONDS", 0.05)
    monkeypatch.setattr(writer, "REPORT_SECONDS", 0.0)
    client._client.cache_clear()
    yield
    client._client.cache_clear()


def steps(url: str) -> list[int]:
    return [step_of(name) for name in list_checkpoints(open_storage(url).at(CHECKPOINTS_FOLDER))]


def assert_same(url: str, folder: Path) -> None:
    """Assert that the newest checkpoints of a bucket and of a folder hold the same tensors, bit for bit."""
    ours, theirs = (read_newest(place, ("model", "optimizer", "meter")) for place in (url, folder))
    assert ours.name == theirs.name
    for file, group in ours.tensors.items():
        assert all(torch.equal(tensor, theirs.tensors[file][name]) for name, tensor in group.items())


def test_a_run_in_a_bucket_is_that_in_a_folder(
    digits_recipe: Recipe, url: str, s3: S3Server, tmp_path: Path
) -> None:
    whole = run(digits_recipe, tmp_path / "whole")
    first, second = Recorder(), Recorder()
    calls = iter(range(1, 100))
    s3.proxy.fault = lambda method, path: "500" if next(faults) % 20 == 0 else None
    faults = iter(range(1, 10**6))
    loop.train(digits_recipe, url, WORLD, first, lambda: next(calls) == 10)
    assert steps(url) == [8, 10]
    loop.train(digits_recipe, url, WORLD, second)
    assert steps(url) == [16, 24]  # keep_checkpoints=2
    assert second.notes == ["resumed at step 10 of 24"]
    assert first.metrics | second.metrics == whole
    s3.proxy.fault = no_fault
    assert_same(url, tmp_path / "whole")
    assert load_model(url, WORLD.device).step == 24
    assert load_model(f"{url}/checkpoints/step-00000016", WORLD.device).location.endswith("step-00000016")


def test_a_damaged_object_costs_its_checkpoint_alone(digits_recipe: Recipe, url: str) -> None:
    loop.train(digits_recipe, url, WORLD, Recorder())
    checkpoints = open_storage(url).at(CHECKPOINTS_FOLDER)
    content = checkpoints.read("step-00000024/model.safetensors")
    assert content is not None
    checkpoints.write("step-00000024/model.safetensors", content[:-1] + bytes([content[-1] ^ 1]))
    calls, log = iter(range(1, 100)), Recorder()
    loop.train(digits_recipe, url, WORLD, log, lambda: next(calls) == 1)
    assert log.notes == [
        f"skipped a damaged checkpoint: {url}/checkpoints/step-00000024/model.safetensors does not match its checksum",
        "resumed at step 16 of 24",
    ]
    assert steps(url) == [16, 17]


@pytest.mark.usefixtures("impatient")
def test_an_outage_is_reported_and_training_continues(digits_recipe: Recipe, url: str, s3: S3Server) -> None:
    """Refuse every request from step 10 to step 20, which no checkpoint outlives."""
    log = Recorder()
    every_step = digits_recipe.train.model_copy(update={"log_every": "1 steps"})
    recipe = digits_recipe.model_copy(update={"train": every_step})

    def wait_for(words: str) -> None:
        deadline = time.monotonic() + 60
        while not any(words in note for note in log.notes):
            assert time.monotonic() < deadline, log.notes
            time.sleep(0.02)

    def at_step(metrics: dict[str, float], step: int) -> None:
        s3.proxy.fault = (lambda method, path: "refuse") if 10 <= step < 20 else no_fault
        # A fast loop would reach step 20 before the writer has met the outage, and the end before it is over.
        if step == 18:
            wait_for("step 16 could not be written")
        if step == 20:
            wait_for("answers again")

    recorded = log.log
    log.log = lambda metrics, step: (recorded(metrics, step), at_step(metrics, step))[0]  # type: ignore[method-assign]
    outcome = loop.train(recipe, url, WORLD, log)
    assert outcome.finished
    assert steps(url)[-1] == 24
    outage = next(note for note in log.notes if "step 16 could not be written" in note)
    assert "to s3://" in outage
    assert "training continues" in outage


@pytest.mark.long
@pytest.mark.usefixtures("impatient")
def test_an_outage_at_the_end_fails_the_run_and_keeps_the_newest_good_one(
    digits_recipe: Recipe, url: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PATIENCE_SECONDS", 0.2)
    log, recorded = Recorder(), Recorder.log

    def log_and_refuse(metrics: dict[str, float], step: int) -> None:
        recorded(log, metrics, step)
        if step == 24:
            s3.proxy.fault = lambda method, path: "refuse"

    log.log = log_and_refuse  # type: ignore[method-assign]
    with pytest.raises(
        CheckpointFailed, match=r"step 24 could not be written to s3://.*it answers with errors"
    ):
        loop.train(digits_recipe, url, WORLD, log)
    s3.proxy.fault = no_fault
    assert steps(url) == [8, 16]


@pytest.mark.long
@pytest.mark.usefixtures("impatient")
def test_a_store_that_cannot_be_read_is_no_new_run(digits_recipe: Recipe, url: str, s3: S3Server) -> None:
    loop.train(digits_recipe, url, WORLD, Recorder())
    s3.proxy.fault = lambda method, path: "refuse" if path.endswith("model.safetensors") else None
    with pytest.raises(OSError, match="it answers with errors"):
        loop.train(digits_recipe, url, WORLD, Recorder())


def test_metrics_are_in_the_store_before_the_checkpoint_that_needs_them(
    digits_recipe: Recipe, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill the first attempt: only what a checkpoint has made sure of is left of its metrics."""
    monkeypatch.setattr("resnet_dist.runs.storage.logs.SHIP_SECONDS", 1e6)
    lines = open_storage(url).log(SPOOL_FILE)
    spool = Spool(lines)
    calls = iter(range(1, 100))
    loop.train(digits_recipe, url, WORLD, spool, lambda: next(calls) == 17)
    spool.log({"train/loss": 9.0}, 18)  # `spool` is never closed: its process was killed
    with Spool(lines) as again:
        loop.train(digits_recipe, url, WORLD, again)
    logged = [entry.step for entry in Follower(lines).read() if entry.metrics]
    assert logged == [5, 10, 12, 15, 20, 24, 24]


def test_retention_removes_the_manifest_first(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = open_storage(url).at(CHECKPOINTS_FOLDER)
    for step in (1, 2):
        tensors = {name: {"x": torch.zeros(1)} for name in ("model", "optimizer", "meter")}
        write_checkpoint(checkpoints, step, tensors, {"scalars": {}, "recipe": {}, "classes": []})
    deleted: list[str] = []
    delete = Bucket.delete

    def see(bucket: Bucket, *names: str) -> None:
        deleted.extend(names)
        delete(bucket, *names)

    monkeypatch.setattr(Bucket, "delete", see)
    prune(checkpoints, keep=1, also=())
    assert deleted[0] == "step-00000001/checkpoint.json"
    assert len(deleted) == 4
    assert steps(url) == [2]


@pytest.mark.usefixtures("impatient")
def test_a_removal_that_broke_off_is_finished_and_recorded_after_the_next_checkpoint(
    digits_recipe: Recipe, url: str, s3: S3Server
) -> None:
    state, storage = initial_state(digits_recipe, 10, WORLD), open_storage(url)
    recipe = digits_recipe.with_overrides(["train.keep_checkpoints=1"])
    removed: list[int] = []

    def record(step: int, sha256: str | None) -> None:
        removed.extend([step] if sha256 is None else [])

    deletions = itertools.count()

    def break_off(method: str, path: str) -> str | None:
        # The first two are those of manifests: of the one that is written, where it existed, and of the one that is removed.
        return "refuse" if path.endswith("?delete") and next(deletions) >= 2 else None

    with Checkpointer(storage, recipe, (), WORLD, lambda note: None, record=record) as saver:
        for state.step in (1, 2, 3):
            s3.proxy.fault = break_off if state.step == 2 else no_fault
            saver.save(state)
            saver.wait()
            if state.step == 2:
                assert (list_checkpoints(storage), removed) == (["step-00000002"], [])
                assert [found.name for found in storage.objects("step-00000001")] != []
    assert {found.name.partition("/")[0] for found in storage.objects()} == {"step-00000003"}
    assert removed == [1, 2]


def test_a_checkpoint_appears_with_its_manifest(digits_recipe: Recipe, url: str, s3: S3Server) -> None:
    state = initial_state(digits_recipe, 10, WORLD)
    uploaded: list[str] = []
    gate = threading.Event()

    def see(method: str, path: str) -> None:
        if method == "PUT" and "/step-" in path:
            uploaded.append(path.rpartition("/")[2])
            if path.endswith("checkpoint.json"):
                assert gate.wait(60)

    s3.proxy.fault = see
    storage = open_storage(url)
    with Checkpointer(storage, digits_recipe, (), WORLD, lambda note: None) as saver:
        saver.save(state)
        deadline = time.monotonic() + 60
        while "checkpoint.json" not in uploaded:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert list_checkpoints(storage) == []
        gate.set()
        saver.wait()
        assert list_checkpoints(storage) == ["step-00000000"]
        assert fetch_checkpoint(storage, "step-00000000").manifest["scalars"]["step"] == 0
    assert sorted(uploaded[:-1]) == ["meter.safetensors", "model.safetensors", "optimizer.safetensors"]
