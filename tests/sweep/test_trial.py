"""A trial in a thread: its evaluations, its end however it comes, and the stops that the driver requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.driver.request import Interrupted, Reporter, Request, Summary
from resnet_dist.errors import Diverged, StorageError
from resnet_dist.runs.choose import choose_run
from resnet_dist.runs.folder import RunFolder
from resnet_dist.sweep.plan import Outcome
from resnet_dist.sweep.trial import TrialRun
from resnet_dist.sweep.watch import Watch
from resnet_dist.tracking.origin import STOPPED_TAG
from resnet_dist.tracking.spool import Entry
from resnet_dist.train.loop import Outcome as TrainingOutcome

METRIC = "eval/top1"


@pytest.fixture
def request_of(digits_recipe: Recipe, tmp_path: Path) -> Request:
    return Request(digits_recipe, "digits.py", tmp_path, local=True, name="s-001")


@pytest.fixture
def run(request_of: Request) -> RunFolder:
    return choose_run(request_of.output, request_of.recipe, request_of.name, resume=False)


def reports_of(request: Request, end: Callable[[], Summary]) -> list[Mapping[str, Any]]:
    """Return the reports of a trial of ten steps that is evaluated at three of them."""

    def train(request: Request, reporter: Reporter) -> Summary:
        reporter.note("run s-001: 10 steps")
        reporter.begin(10)
        for step in (3, 6, 10):
            reporter.entry(Entry(0, step, {"train/loss": 1.0}))
            reporter.entry(Entry(0, step, {METRIC: step / 10, "eval/loss": 1.0}))
        return end()

    trial = TrialRun(request, METRIC, train)
    reports = [trial.next_report()]
    while not reports[-1].get("done"):
        reports.append(trial.next_report())
    trial.join(10)
    assert trial.has_ended
    return reports


def test_evaluations_and_the_end_are_reported(request_of: Request, run: RunFolder) -> None:
    metrics = {METRIC: 0.8, "eval/loss": 0.9, "perf/images_per_second": 1.0}
    outcome = TrainingOutcome(10, 10, metrics, finished=True)
    *evaluations, end = reports_of(request_of, lambda: Summary(run, outcome, None, 5.0))
    assert [(one["step"], one["value"], one["progress"]) for one in evaluations] == [
        (3, 0.3, 300),
        (6, 0.6, 600),
    ]
    assert evaluations[0]["notes"] == ["run s-001: 10 steps"]
    assert evaluations[1]["notes"] == []
    assert (end["value"], end["progress"]) == (0.8, 1000)
    assert Outcome(**end["outcome"]) == Outcome(
        "finished", 0.8, 10, {METRIC: 0.8, "eval/loss": 0.9}, seconds=5.0
    )


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (Diverged("the training loss is nan"), "diverged", "the training loss is nan"),
        (StorageError("the disk is full"), "failed", "the disk is full"),
        (ZeroDivisionError("x"), "failed", "ZeroDivisionError: x"),
        (SystemExit(3), "failed", "SystemExit: 3"),
        (KeyboardInterrupt(), "interrupted", ""),
    ],
)
def test_whatever_ends_it_is_reported(
    request_of: Request, error: BaseException, state: str, reason: str
) -> None:
    def end() -> Summary:
        raise error

    outcome = Outcome(**reports_of(request_of, end)[-1]["outcome"])
    assert (outcome.state, outcome.reason) == (state, reason)
    assert (outcome.value, outcome.step) == (1.0, 10)


@pytest.mark.parametrize(("tags", "state"), [({}, "interrupted"), ({STOPPED_TAG: "ASHA"}, "stopped")])
def test_a_stop_with_a_reason_is_a_result(
    request_of: Request, run: RunFolder, tags: dict[str, str], state: str
) -> None:
    def end() -> Summary:
        raise Interrupted(run.with_tags(tags), 6)

    outcome = Outcome(**reports_of(request_of, end)[-1]["outcome"])
    assert (outcome.state, outcome.reason) == (state, tags.get(STOPPED_TAG, ""))


class Seen:
    """A watch over one trial, and what it hands on."""

    def __init__(self, request: Request, folder: Path) -> None:
        self.lines: list[str] = []
        self.ends: list[tuple[str, Outcome]] = []
        self.stop_file = folder / ".stop"
        self.stop_file.touch()  # An earlier command left it.
        ended = lambda name, outcome: self.ends.append((name, outcome))  # noqa: E731
        self.watch = Watch({"s-001": request}, METRIC, self.stop_file, self.lines.append, ended)


def test_a_stop_is_requested_of_trials_that_run(request_of: Request, run: RunFolder, tmp_path: Path) -> None:
    run.write()
    seen = Seen(request_of, tmp_path)
    watch = seen.watch
    assert not seen.stop_file.exists()
    watch.stop("s-001", "ASHA stopped it")
    watch.request_stops()
    assert run.stop_reason() == ""  # It does not run yet.
    watch.started("s-001")
    watch.request_stops()
    assert run.stop_reason() == "ASHA stopped it"
    assert not watch.is_stopped
    watch.reported(
        "s-001", {"done": True, "outcome": {"state": "stopped", "value": 0.5}, "notes": ["a note"]}
    )
    assert seen.ends == [("s-001", Outcome("stopped", 0.5))]
    assert seen.lines == ["s-001: a note"]


def test_an_interruption_stops_all_and_lets_none_begin(
    request_of: Request, run: RunFolder, tmp_path: Path
) -> None:
    run.write()
    seen = Seen(request_of, tmp_path)
    watch = seen.watch
    watch.started("s-001")
    watch.reported("s-001", {"step": 3, "value": 0.25, "metrics": {}})
    assert seen.lines == ["s-001: step 3  eval/top1 0.25"]
    watch.stop_all()
    assert seen.stop_file.exists()
    watch.request_stops()
    assert run.storage.read("stop") == b""
    assert not watch.is_stopped  # It saves still.
    watch.reported("s-001", {"done": True})  # One that has not begun has no outcome.
    assert watch.is_stopped
    assert not seen.ends


def test_a_request_that_the_run_removed_is_repeated(
    request_of: Request, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write()
    seen = Seen(request_of, tmp_path)
    monkeypatch.setattr("resnet_dist.sweep.watch.REPEAT_SECONDS", 0.0)
    seen.watch.started("s-001")
    seen.watch.stop("s-001", "why")
    for _ in range(2):
        seen.watch.request_stops()
        assert run.stop_reason() == "why"
        run.write()  # as the next attempt does
        assert run.stop_reason() == ""


def test_reports_wait_for_the_trial(request_of: Request) -> None:
    go_on = Event()

    def train(request: Request, reporter: Reporter) -> Summary:
        assert go_on.wait(30)
        raise Diverged("nan")

    trial = TrialRun(request_of, METRIC, train)
    assert not trial.has_ended
    go_on.set()
    assert trial.next_report()["outcome"]["state"] == "diverged"
