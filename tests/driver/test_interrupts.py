"""Signals at any moment: one press counts as one signal, and a run is never left open."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver import preflight
from resnet_dist.driver.request import Interrupted, Request, Summary
from resnet_dist.driver.run import run_training
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RunFolder, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.system import signals
from resnet_dist.system.signals import (
    GRACE_SECONDS,
    StopRequest,
    defer_signals,
    handle_signals,
    raise_interrupt,
)
from resnet_dist.tracking.console import ConsolePublisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry
from resnet_dist.train import loop
from resnet_dist.train.watch.guards import Guard
from tests.paths import list_checkpoints
from tests.reporter import RecordingReporter


def press(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_signals_of_one_moment_are_one_press(monkeypatch: pytest.MonkeyPatch) -> None:
    now, counts = [100.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with handle_signals(counts.append):
        for moment, number in ((100.0, signal.SIGINT), (100.4, signal.SIGTERM), (103.0, signal.SIGINT)):
            now[0] = moment
            press(number)
    assert counts == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before


def test_what_must_not_be_cut_in_two_is_not() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), defer_signals():  # noqa: PT012
        press()
        done.append(True)
    assert done
    with pytest.raises(KeyboardInterrupt), handle_signals(raise_interrupt):
        press()


def test_the_grace_time_ends() -> None:
    now = [0.0]
    stop = StopRequest(clock=lambda: now[0])
    assert (stop.requested(), stop.expired()) == (False, False)
    stop.request(1)
    now[0] = GRACE_SECONDS - 1
    assert (stop.requested(), stop.expired()) == (True, False)
    now[0] = GRACE_SECONDS
    assert stop.expired()
    again = StopRequest()
    again.request(1)
    again.request(2)
    assert again.expired()


class SignallingPublisher:
    """A publisher that receives a signal in one of its calls."""

    run_id = "id"
    unsent = ("the model",)

    def __init__(self, signal_in: str) -> None:
        self.signal_in = signal_in
        self.calls: list[str] = []
        self._call("open")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name.split()[0] == self.signal_in:
            press()

    def start(self) -> None:
        self._call("start")

    def describe_attempt(self, run: RunFolder) -> None:
        pass

    def abandon(self) -> None:
        self._call("abandon")

    def finish(self, timeout_seconds: float) -> None:
        self._call("finish")

    def num_waiting(self) -> int:
        return 0

    def log_results(self, checkpoint: str | None) -> None:
        self._call(f"log_results {checkpoint}")

    def close(self, status: str, timeout_seconds: float) -> None:
        self._call(f"close {status}")


RESULTS = "log_results step-00000003"


def train(recipe: Recipe, folder: Path, open_publisher: Callable[..., Any]) -> Summary:
    request = Request(recipe, "jobs/digits.py", folder, gpu=False, local=True, name="x")
    return run_training(request, RecordingReporter(), open_publisher)


@pytest.mark.parametrize(
    ("signal_in", "calls"),
    [
        ("open", ["open", "finish", "close KILLED"]),
        ("start", ["open", "start", "finish", "close KILLED"]),
        ("finish", ["open", "start", "finish", "close KILLED"]),
        ("log_results", ["open", "start", "finish", RESULTS, "close KILLED"]),
        ("close", ["open", "start", "finish", RESULTS, "close FINISHED"]),
    ],
)
def test_a_signal_to_the_driver_closes_the_run(
    digits_recipe: Recipe, tmp_path: Path, signal_in: str, calls: list[str]
) -> None:
    recipe = digits_recipe.with_overrides(["train.length=3 steps"])
    made = []

    def open_publisher(*arguments: object) -> SignallingPublisher:
        made.append(SignallingPublisher(signal_in))
        return made[-1]

    if signal_in == "close":  # It is too late to interrupt: the run is finished.
        assert train(recipe, tmp_path, open_publisher).outcome.finished
    else:
        with pytest.raises(Interrupted) as interrupted:
            train(recipe, tmp_path, open_publisher)
        assert interrupted.value.run.name == "x"
    assert made[0].calls == calls
    again = train(recipe, tmp_path, lambda *arguments: SignallingPublisher("nothing"))
    assert again.outcome.finished
    run = read_run(open_storage(tmp_path / "runs/x"))
    assert run is not None
    assert (run.attempt, run.run_id) == (2, "id")
    assert (run.status, run.unsent) == ("FINISHED", ("the model",))


def test_the_model_that_is_logged_is_the_best(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.9, 0.5, 0.7, 0.6])

    def evaluation(*arguments: object) -> dict[str, float]:
        return {"eval/top1": next(values), "eval/loss": 1.0, "eval/samples": 360.0}

    monkeypatch.setattr(loop, "evaluate_unless_stopped", evaluation)
    monkeypatch.setattr(Guard, "check_evaluation", lambda *arguments: None)
    recipe = digits_recipe.with_overrides(
        ["train.length=4 steps", "train.eval_every=1 steps", "train.keep_checkpoints=1"]
    )
    for name, metric, logged in (("last", "none", 4), ("best", "eval/top1", 1)):
        values = iter([0.9, 0.5, 0.7, 0.6])
        publisher = SignallingPublisher("nothing")
        chosen = recipe.with_overrides([f"train.best_metric={metric}"])
        request = Request(chosen, "jobs/digits.py", tmp_path, gpu=False, local=True, name=name)
        run_training(request, RecordingReporter(), lambda *arguments, publisher=publisher: publisher)
        assert f"log_results step-{logged:08d}" in publisher.calls


def test_a_signal_while_data_are_prepared_leaves_no_run(
    digits_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "prepare_missing", lambda *arguments: press(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(digits_recipe, tmp_path, lambda *arguments: SignallingPublisher("nothing"))
    assert not (tmp_path / "runs").exists()


def test_a_tracker_that_cannot_be_used_leaves_no_run(digits_recipe: Recipe, tmp_path: Path) -> None:
    def refuse(*arguments: object) -> SignallingPublisher:
        raise UserError("MLflow cannot be used")

    with pytest.raises(UserError, match="cannot be used"):
        train(digits_recipe, tmp_path, refuse)
    assert not (tmp_path / "runs/x").exists()


def test_a_signal_in_training_saves(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(["train.length=2000 steps", "train.checkpoint_every=0 steps"])

    def open_publisher(record: RunRecord, on_entry: object) -> ConsolePublisher:
        def see(entry: Entry) -> None:
            if entry.step == 5:
                press()

        return ConsolePublisher(record.run.spool, see)

    with pytest.raises(Interrupted) as interrupted:
        train(recipe, tmp_path, open_publisher)
    assert interrupted.value.step is not None
    assert interrupted.value.step >= 5
    newest = list_checkpoints(tmp_path / "runs/x/checkpoints")[-1]
    assert newest.name == f"step-{interrupted.value.step:08d}"
