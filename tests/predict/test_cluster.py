"""Predictions by workers: inputs that other processes read, the same rows, one for each input after any kill."""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray.cloudpickle
import torch
from ray.exceptions import RayTaskError

from resnet_dist.data.findings import Findings
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.errors import RankFailed, UserError
from resnet_dist.launch.on_ray import mapped
from resnet_dist.predict import shards
from resnet_dist.predict.classify import predictions
from resnet_dist.predict.cluster import Classifier, predictions_on
from resnet_dist.predict.inputs import inputs_of
from resnet_dist.train.checkpoint.load import TrainedModel, load_model
from tests.checkpoints import random_checkpoint

COPIES = 24
NUM_DIGITS = 360


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("digits_model")
    path, _ = random_checkpoint(folder, "model.name=resnet8", classes=tuple("0123456789"))
    return load_model(path, torch.device("cpu"))


def test_other_processes_read_the_same_bytes(
    digits_model: TrainedModel, digits_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = digits_model.recipe.data
    monkeypatch.chdir(digits_data)
    given = list(inputs_of(["eval"], data, Findings()))
    (tmp_path / "one.png").write_bytes(given[0].read())
    monkeypatch.chdir(tmp_path)
    given += inputs_of(["one.png"], data, Findings())
    monkeypatch.chdir("/")  # Workers run in other folders.
    sent = [pickle.loads(ray.cloudpickle.dumps(one.portable())) for one in given]
    assert [one.name for one in sent] == [one.name for one in given]
    assert [one.read() for one in sent[:-1]] == [one.read() for one in given[:-1]]
    assert sent[-1].read() == given[0].read()


def test_threads_share_one_cache_of_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, closed = list[bool](), list[object]()

    class Cache:
        def __init__(self, limits: CacheLimits) -> None:
            made.append(shards._making.locked())  # No other thread makes one meanwhile.

        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(shards, "ShardCache", Cache)
    monkeypatch.setattr(shards, "_made", {})
    limits = CacheLimits(tmp_path, 1, 1.0)
    first = shards._tars(limits)
    assert shards._tars(limits) is first
    assert made == [True]
    assert shards._tars(CacheLimits(tmp_path, 2, 1.0)) is not first
    assert closed == [first._cache]


def test_rows_are_those_of_one_process(digits_model: TrainedModel, digits_data: Path) -> None:
    inputs = list(inputs_of([str(digits_data / "eval")], digits_model.recipe.data, Findings()))

    def mapped_here(
        make: Callable[..., Any], arguments: tuple[Any, ...], items: Iterator[Any], *, batch_size: int
    ) -> Iterator[list[Any]]:
        function, found = make(*arguments), list(items)
        assert batch_size == 256  # four forward passes of 64
        for low in range(0, len(found), batch_size):
            yield list(function(found[low : low + batch_size]))

    rows = [row for some in predictions_on(mapped_here, digits_model, inputs, 3, gpu=False) for row in some]
    ours = [row for some in predictions(digits_model, inputs, torch.device("cpu"), 3) for row in some]
    assert rows == ours
    assert Classifier(digits_model, 3, False, False)(inputs[:2]) == ours[:2]


def test_the_error_of_a_worker_is_that_of_its_function() -> None:
    mistake = RayTaskError("f", "trace", UserError("wrong"))
    wrapped = RuntimeError("Ray Data failed")
    wrapped.__cause__ = mistake
    assert str(mapped.explained(wrapped)) == "wrong"
    found = mapped.explained(RuntimeError("worker died\nmore"))
    assert isinstance(found, RankFailed)
    assert str(found) == "a worker failed: worker died"


def test_a_cluster_without_room_is_reported_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = iter([0.0, 1.0, 61.0, 62.0, 601.0]), list[str]()
    monkeypatch.setattr(mapped, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(mapped, "free_and_held", lambda: "0 of 2 CPUs are free")
    monkeypatch.setattr(mapped, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(mapped, "_is_running", lambda: False)
    with pytest.raises(RankFailed, match="no worker has run for 601 s; 0 of 2 CPUs are free"):
        mapped._next(queue.Queue(), lines.append)
    assert lines == ["no result for 61 s; 0 of 2 CPUs are free"]


def test_a_slow_worker_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found: queue.Queue[str] = queue.Queue()
    times = iter([0.0, 599.0, 1198.0, 1797.0, 2396.0, 2500.0])

    def clock() -> float:
        now = next(times)
        if now == 2396.0:
            found.put("late")
        return now

    monkeypatch.setattr(mapped, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(mapped, "free_and_held", lambda: "0 of 2 CPUs are free")
    monkeypatch.setattr(mapped, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(mapped, "_is_running", lambda: True)
    assert mapped._next(found, lambda text: None) == "late"


def actors(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "MapWorker" in " ".join(process.info["cmdline"] or ()) and os.getsid(process.pid) == session:
            found.append(process)
    return found


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_killed_worker_and_a_killed_driver_leave_one_row_for_each_input(
    digits_data: Path, tmp_path: Path
) -> None:
    folder, _ = random_checkpoint(tmp_path / "m", "model.name=resnet8", classes=tuple("0123456789"))
    shards = [str(digits_data / "eval")] * COPIES
    base = [sys.executable, "-m", "resnet_dist", "predict", str(folder), *shards]
    command = [*base, "--to", "rows.jsonl", "--workers", "2", "--cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment, "text": True}
    partial = tmp_path / "rows.jsonl.partial"

    def started() -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, start_new_session=True, **pipes, **options)

    def wait_for_rows(process: subprocess.Popen[str], num_rows: int) -> None:
        while count(partial) < num_rows:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    driver = started()
    wait_for_rows(driver, 500)
    # Rows have come, and more are to come: an actor is there.
    victim, *_ = actors(driver.pid)
    victim.kill()
    wait_for_rows(driver, 2500)
    driver.kill()
    driver.communicate()
    assert not (tmp_path / "rows.jsonl").exists()
    assert count(partial) < COPIES * NUM_DIGITS
    again = started()
    out, err = again.communicate(timeout=600)
    assert (again.returncode, out) == (0, f"rows.jsonl: {COPIES * NUM_DIGITS:,} rows\n"), err
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    one = [sys.executable, "-m", "resnet_dist", "predict", str(folder), shards[0], "--json"]
    done = subprocess.run(one, capture_output=True, timeout=400, check=True, **options)
    local = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == COPIES * NUM_DIGITS
    for number, row in enumerate(rows):
        wanted = local[number % NUM_DIGITS]
        assert (row["input"], row["classes"][0], row["problem"]) == (
            wanted["input"],
            wanted["classes"][0],
            None,
        )
        assert row["probabilities"] == pytest.approx(wanted["probabilities"], abs=1e-5)
