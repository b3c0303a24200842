"""A driver that lost its run, because it stood still for too long: it stops, and leaves everything to the next one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver import run as driver_run
from resnet_dist.driver.request import Request
from resnet_dist.errors import RankFailed, RanksLost, Superseded
from resnet_dist.launch.local import local_launcher
from resnet_dist.runs.folder import STOP_FILE, RunFolder, Status, token_name
from resnet_dist.runs.storage import lease
from resnet_dist.runs.storage.holder import Holder
from resnet_dist.runs.storage.lease import LEASE_FILE
from resnet_dist.system.command import TRAINING_THREAD
from resnet_dist.tracking.console import ConsolePublisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry
from resnet_dist.train.checkpoint.folder import list_checkpoints
from resnet_dist.train.loop import Outcome
from tests.reporter import RecordingReporter

NEXT = replace(Holder.this_process(), id="next", host="h9")


class Publisher:
    """A publisher that records how it was ended."""

    run_id = None
    unsent = ()

    def __init__(self) -> None:
        self.ends: list[str] = []
        self.attempts: list[RunFolder] = []

    def start(self) -> None: ...

    def describe_attempt(self, run: RunFolder) -> None:
        self.attempts.append(run)

    def finish(self, timeout_seconds: float) -> None: ...

    def num_waiting(self) -> int:
        return 0

    def log_results(self, checkpoint: str | None) -> None:
        self.ends.append("results")

    def close(self, status: Status, timeout_seconds: float) -> None:
        self.ends.append(status)

    def abandon(self) -> None:
        self.ends.append("abandoned")


@pytest.fixture(params=["folder", "bucket"])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | str:
    monkeypatch.chdir(tmp_path)
    if request.param == "bucket":
        return f"s3://{request.getfixturevalue('s3').new_bucket()}/output"
    return tmp_path / "output"


def sleep_until_taken_over(run: RunFolder) -> None:
    """Let another driver take the run and begin its attempt, while this one stood still for longer than its lease."""
    assert run.lease is not None
    with run.lease._beating:  # A beat that has begun would write over what the next driver wrote.
        run.storage.write(LEASE_FILE, NEXT.encode())
        replace(run, lease=None, attempt=run.attempt + 1, token="of the next").write()
        run.lease._renewed_at -= lease.EXPIRY_SECONDS


def interrupted_while_it_slept(run: RunFolder) -> Outcome | None:
    sleep_until_taken_over(run)
    with pytest.raises(Superseded):
        run.request_stop()
    return None


def lost_its_ranks(run: RunFolder) -> Outcome | None:
    sleep_until_taken_over(run)
    raise RanksLost("rank 1 was lost with its node", "a dump")


def finished(run: RunFolder) -> Outcome | None:
    run.checkpoints.write("step-00000008/checkpoint.json", b"{}")
    run.storage.log("spool.jsonl").open().close()
    sleep_until_taken_over(run)
    return Outcome(8, 8, {}, finished=True)


def failed(run: RunFolder) -> Outcome | None:
    sleep_until_taken_over(run)
    raise RankFailed("rank 0 failed: ValueError: x")


@pytest.mark.parametrize("end", [interrupted_while_it_slept, lost_its_ranks, finished, failed])
def test_a_driver_that_lost_its_run_writes_nothing_more(
    end: Callable[[RunFolder], Outcome | None],
    output: Path | str,
    digits_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver_run, "check_results", lambda run: run.check_lease())
    runs: list[RunFolder] = []

    def launch(run: RunFolder) -> Outcome | None:
        runs.append(run)
        return end(run)

    publisher = Publisher()
    monkeypatch.setattr(driver_run, "launcher_of", lambda *arguments: nullcontext(launch))
    request = Request(digits_recipe, "digits.py", output, local=True, name="x", max_restarts=3)
    with pytest.raises(Superseded, match=r"another process has taken this run over: .* on h9, process"):
        driver_run.run_training(request, RecordingReporter(), lambda *arguments: publisher)
    storage = runs[0].storage
    assert len(runs) == 1
    assert publisher.ends == ["abandoned"]
    assert storage.read(LEASE_FILE) == NEXT.encode()
    assert storage.read(STOP_FILE) is None
    assert storage.read(token_name("of the next")) is not None
    assert set(storage.folders()) <= {"checkpoints", "page", "tokens"}
    assert b'"attempt": 2' in (storage.read("run.json") or b"")
    assert b'"status": null' in (storage.read("run.json") or b"")


def test_one_process_that_lost_its_run_stops_before_the_next_checkpoint(
    tmp_path: Path, digits_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop itself, with its fence: the machine sleeps before the first checkpoint."""
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.2)
    runs: list[RunFolder] = []

    class Reporter(RecordingReporter):
        def entry(self, entry: Entry) -> None:
            if entry.metrics and not taken:
                taken.append(True)
                sleep_until_taken_over(runs[0])

    taken: list[bool] = []
    recipe = digits_recipe.with_overrides(
        [f"train.{name}=100000 steps" for name in ("length", "eval_every", "checkpoint_every")]
    )
    launcher = local_launcher(recipe, gpu=False)

    def launch(run: RunFolder) -> Outcome | None:
        runs.append(run)
        return launcher(run)

    def open_publisher(record: RunRecord, on_entry: Callable[[Entry], None]) -> ConsolePublisher:
        return ConsolePublisher(record.run.spool, on_entry)

    monkeypatch.setattr(driver_run, "launcher_of", lambda *arguments: nullcontext(launch))
    request = Request(recipe, "digits.py", tmp_path, local=True, name="x")
    # The heartbeat of this process finds it out, or its rank, whichever looks first.
    taken_over = "another process has taken this run over|attempt 2 of the run has begun"
    with pytest.raises((Superseded, RankFailed), match=taken_over):
        driver_run.run_training(request, Reporter(), open_publisher)
    assert runs[0].storage.read(LEASE_FILE) == NEXT.encode()
    assert runs[0].storage.read(token_name("of the next")) is not None
    assert list_checkpoints(runs[0].checkpoints) == []
    for thread in threading.enumerate():
        if thread.name == TRAINING_THREAD:  # It ends by itself, also where no process ends with it.
            thread.join()
