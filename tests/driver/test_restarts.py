"""Restarts: what the machine did is repeated within limits, what a person did is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver import restarts
from resnet_dist.driver import run as driver_run
from resnet_dist.driver.request import Interrupted, Request
from resnet_dist.driver.restarts import WINDOW_SECONDS, Restart, Restarts, launch_with_restarts
from resnet_dist.errors import RankFailed, RanksLost, TrainingError
from resnet_dist.launch.attempt import ClusterChanged
from resnet_dist.runs.folder import RunFolder, failure_name, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Unreachable
from resnet_dist.tracking.console import ConsolePublisher
from resnet_dist.train.loop import Outcome

END = Outcome(8, 8, {}, finished=True)
LOST = RanksLost("rank 1 on h2 (10.0.0.2) was killed or crashed", "a\nlong dump")


class Launches:
    """A launcher whose attempts end as listed; each may leave a checkpoint."""

    def __init__(self, *ends: tuple[Exception | Outcome | None, int]) -> None:
        self.ends = list(ends)
        self.attempts: list[int] = []

    def __call__(self, run: RunFolder) -> Outcome | None:
        self.attempts.append(run.attempt)
        end, step = self.ends.pop(0)
        if step:
            run.checkpoints.write(f"step-{step:08d}/checkpoint.json", b"{}")
        if isinstance(end, Exception):
            raise end
        return end


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(open_storage(tmp_path / "x"), "x", None, 1, {})
    folder.write()
    return folder


def test_lost_ranks_start_again_from_the_newest_checkpoint(run: RunFolder) -> None:
    launch, begun = Launches((LOST, 0), (LOST, 20), (END, 0)), []
    ended, outcome = launch_with_restarts(
        run, launch, Restarts(10), lambda run, restart: begun.append(restart)
    )
    assert (outcome, ended.attempt, launch.attempts) == (END, 3, [1, 2, 3])
    assert [restart.step for restart in begun] == [0, 20]
    recorded = read_run(run.storage)
    assert recorded is not None
    assert recorded.attempt == 3  # A rank of an earlier attempt can see that it is no longer the newest.
    for attempt in (1, 2):
        assert b"a\nlong dump" in (run.storage.read(failure_name(attempt)) or b"")


@pytest.mark.parametrize(("seconds", "waits"), [(60.0, True), (0.0, False)])
def test_a_restart_waits_for_a_storage_that_does_not_answer(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, seconds: float, waits: bool
) -> None:
    monkeypatch.setattr(restarts, "PATIENCE_SECONDS", seconds)
    monkeypatch.setattr(restarts, "RETRY_SECONDS", 0.0)
    failures, lines = iter([Unreachable("s3://b: it does not answer in time")] * 2), list[str]()
    write = RunFolder.write

    def fail_twice(self: RunFolder) -> None:
        if (failure := next(failures, None)) is not None:
            raise failure
        write(self)

    monkeypatch.setattr(RunFolder, "write", fail_twice)
    launch = Launches((LOST, 4), (END, 0))
    with nullcontext() if waits else pytest.raises(Unreachable):
        launch_with_restarts(run, launch, Restarts(10), lambda run, restart: None, lines.append)
    assert launch.attempts == ([1, 2] if waits else [1])
    assert len(lines) == waits


@pytest.mark.parametrize(
    "error", [TrainingError("the loss is not finite"), RankFailed("rank 0 failed: ValueError: x")]
)
def test_a_mistake_and_a_defect_end_the_run(run: RunFolder, error: Exception) -> None:
    launch = Launches((error, 4))
    with pytest.raises(type(error), match=str(error)):
        launch_with_restarts(run, launch, Restarts(10), lambda run, restart: None)
    assert launch.attempts == [1]


def test_an_interruption_before_a_checkpoint_ends_the_run(run: RunFolder) -> None:
    launch = Launches((LOST, 4), (None, 0))
    assert launch_with_restarts(run, launch, Restarts(10), lambda run, restart: None)[1] is None


def test_restarts_are_limited_within_an_hour() -> None:
    now = 0.0
    restarts = Restarts(2, clock=lambda: now)
    restarts.add(LOST, 10)
    restarts.add(LOST, 20)
    with pytest.raises(RankFailed, match="h2.*--max-restarts: 2 within an hour"):
        restarts.add(LOST, 30)
    now = WINDOW_SECONDS
    assert restarts.add(LOST, 40).step == 40


def test_no_restart_at_all_is_possible() -> None:
    with pytest.raises(RankFailed, match="--max-restarts: 0"):
        Restarts(0).add(LOST, 10)


def test_planned_starts_and_preemptions_are_not_counted() -> None:
    restarts = Restarts(0)
    for _ in range(5):
        restarts.add(ClusterChanged("the cluster has room for 4 ranks"), 10)
        restarts.add(RanksLost("rank 1 was lost with its node", preempted=True), 10)
    assert len(restarts.past) == 10
    assert all(isinstance(restart, Restart) and restart.planned for restart in restarts.past)


def test_ranks_that_are_lost_without_progress_end_the_run() -> None:
    restarts = Restarts(10)
    restarts.add(LOST, 10)
    restarts.add(LOST, 20)
    restarts.add(LOST, 20)
    with pytest.raises(RankFailed, match="3 times after step 20, without one more checkpoint"):
        restarts.add(LOST, 20)


def test_ranks_that_had_not_begun_are_no_evidence_against_what_they_compute() -> None:
    restarts, before = Restarts(6), RanksLost("a rank was lost while the ranks were started", begun=False)
    for cause in (LOST, before, before, LOST, before):
        restarts.add(cause, 20)
    with pytest.raises(RankFailed, match="3 times after step 20, without one more checkpoint"):
        restarts.add(LOST, 20)
    restarts.add(before, 20)
    with pytest.raises(RankFailed, match="--max-restarts: 6 within an hour"):
        restarts.add(before, 20)


def test_the_attempt_that_ended_the_run_is_recorded(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next command begins the one after it."""
    launch = Launches((LOST, 4), (RankFailed("rank 0 failed: ValueError: x"), 0))
    monkeypatch.setattr(driver_run, "launcher_of", lambda *arguments: nullcontext(launch))
    request = Request(digits_recipe, "digits.py", tmp_path, local=True, name="x", max_restarts=1)
    with pytest.raises(RankFailed, match="ValueError: x"):
        driver_run.run_training(
            request, Mock(), lambda record, on_entry: ConsolePublisher(record.run.spool, on_entry)
        )
    recorded = read_run(open_storage(tmp_path / "runs/x"))
    assert recorded is not None
    assert (launch.attempts, recorded.attempt, recorded.status) == ([1, 2], 2, "FAILED")


def test_a_storage_that_is_away_at_the_end_makes_no_failure_of_a_finished_run(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last looks at the run, and its record, wait for the storage."""
    monkeypatch.setattr(restarts, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(driver_run, "has_steps", lambda spool: True)
    away, ended, notes = Unreachable("s3://b: it does not answer in time"), False, Mock()

    def launch(run: RunFolder) -> Outcome:
        nonlocal ended
        run.checkpoints.write("step-00000008/checkpoint.json", b"{}")
        ended = True
        return END

    def fails_twice(function: Callable[..., object]) -> Callable[..., object]:
        failures = [away, away]

        def call(*arguments: object) -> object:
            if ended and failures:
                raise failures.pop()
            return function(*arguments)

        return call

    monkeypatch.setattr(driver_run, "list_checkpoints", fails_twice(driver_run.list_checkpoints))
    monkeypatch.setattr(driver_run, "failed_evaluations", fails_twice(driver_run.failed_evaluations))
    monkeypatch.setattr(RunFolder, "write", fails_twice(RunFolder.write))
    monkeypatch.setattr(driver_run, "launcher_of", lambda *arguments: nullcontext(launch))
    request = Request(digits_recipe, "digits.py", tmp_path, local=True, name="x")
    summary = driver_run.run_training(
        request, notes, lambda record, on_entry: ConsolePublisher(record.run.spool, on_entry)
    )
    recorded = read_run(open_storage(tmp_path / "runs/x"))
    assert recorded is not None
    assert recorded.status == "FINISHED"
    assert (summary.checkpoint or "").endswith("step-00000008")
    assert sum("waiting for it" in str(call) for call in notes.note.call_args_list) == 3


def test_an_impatient_person_may_end_the_wait_for_the_record_of_a_finished_run(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost: the command that continues the run records its end."""
    monkeypatch.setattr(driver_run, "has_steps", lambda spool: True)
    write = RunFolder.write

    def interrupt_the_last(self: RunFolder) -> None:
        if self.status == "FINISHED":
            raise KeyboardInterrupt
        write(self)

    monkeypatch.setattr(RunFolder, "write", interrupt_the_last)
    monkeypatch.setattr(driver_run, "launcher_of", lambda *arguments: nullcontext(Launches((END, 8))))
    request, reporter = Request(digits_recipe, "digits.py", tmp_path, local=True, name="x"), Mock()
    with pytest.raises(Interrupted) as interrupted:
        driver_run.run_training(
            request, reporter, lambda record, on_entry: ConsolePublisher(record.run.spool, on_entry)
        )
    assert (interrupted.value.run.name, interrupted.value.step) == ("x", 8)
    assert "was not recorded (interrupted)" in str(reporter.note.call_args_list)


def test_a_storage_that_stays_away_ends_the_run_with_the_line_that_continues_it(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = Launches((Unreachable("s3://b: it does not answer in time"), 4))
    monkeypatch.setattr(driver_run, "launcher_of", lambda *arguments: nullcontext(launch))
    request = Request(digits_recipe, "digits.py", tmp_path, local=True, name="x")
    with pytest.raises(RankFailed, match="(?s)does not answer in time.*continues it.*--name x"):
        driver_run.run_training(
            request, Mock(), lambda record, on_entry: ConsolePublisher(record.run.spool, on_entry)
        )
