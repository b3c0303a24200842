"""Train one trial in a thread of this process, and report its evaluations one by one, then its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

from resnet_dist.driver.request import Interrupted, Reporter, Request, Summary
from resnet_dist.errors import Diverged, ExplainedError, exit_code_of
from resnet_dist.runs.folder import RUNS_FOLDER, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.sweep.plan import Outcome, State
from resnet_dist.tracking.origin import STOPPED_TAG
from resnet_dist.tracking.spool import Entry

PROGRESS = 1000  # of a trial that is trained to its end: trials of different lengths are compared by it
EVALUATION = "eval/"  # the prefix of the metrics of an evaluation

Report = Mapping[str, Any]  # see TrialRun
Train = Callable[[Request, Reporter], Summary]


class TrialRun:
    """One trial; a Reporter of its own training. `next_report` returns plain values, which can be sent to the driver.

    An evaluation: "step", "value" of the metric, "progress" in PROGRESS, "metrics". The end: "done" and "outcome".
    Both have "notes", the lines for the person since the last report.
    """

    def __init__(self, request: Request, metric: str, train: Train) -> None:
        """Begin to train at once. train: trains a request to its end, as `run_training` does."""
        self._request, self._metric, self._train = request, metric, train
        self._reports: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._notes: list[str] = []
        self._total = 0
        self._newest: dict[str, Any] = {}  # the newest evaluation
        self._thread = threading.Thread(target=self._run, name="trial", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def next_report(self) -> dict[str, Any]:
        """Wait for the next evaluation, or the end of the trial, and return it."""
        report = self._reports.get()
        notes, self._notes = self._notes, []
        return {**report, "notes": notes}

    def join(self, timeout_seconds: float) -> None:
        self._thread.join(timeout_seconds)

    # The three methods of a Reporter.
    def note(self, text: str) -> None:
        self._notes.append(text)

    def begin(self, total_steps: int) -> None:
        self._total = total_steps

    def entry(self, entry: Entry) -> None:
        if entry.note:
            self.note(entry.note)
        if entry.step is None or self._metric not in entry.metrics:
            return
        self._newest = evaluation(entry, self._metric, self._total)
        if entry.step < self._total:  # The last one is reported with the end.
            self._reports.put(self._newest)

    def _run(self) -> None:
        try:
            outcome = self._outcome()
        except BaseException as error:  # Whatever it is, the driver must learn of the end.
            outcome = self._ended("failed", f"{type(error).__name__}: {error}")
        newest = {"value": outcome.value} if outcome.value is not None else {}
        progress = PROGRESS if outcome.state == "finished" else self._newest.get("progress", 0)
        self._reports.put({**newest, "progress": progress, "done": True, "outcome": asdict(outcome)})

    def _outcome(self) -> Outcome:
        try:
            summary = self._train(self._request, self)
        except Interrupted as interrupted:
            reason = interrupted.run.tags.get(STOPPED_TAG, "")
            return self._ended("stopped" if reason else "interrupted", reason)
        except Diverged as diverged:
            return self._ended("diverged", str(diverged))
        except ExplainedError as error:
            return self._ended("failed", str(error))
        except KeyboardInterrupt as error:  # Stopped before its run existed.
            assert exit_code_of(error)
            return self._ended("interrupted", "")
        metrics = {key: value for key, value in summary.outcome.metrics.items() if key.startswith(EVALUATION)}
        value = metrics.get(self._metric)
        return Outcome("finished", value, summary.outcome.step, metrics, seconds=summary.seconds)

    def _ended(self, state: State, reason: str) -> Outcome:
        newest = self._newest
        return Outcome(state, newest.get("value"), newest.get("step"), newest.get("metrics", {}), reason)


def evaluation(entry: Entry, metric: str, total_steps: int) -> dict[str, Any]:
    """Return the report of an evaluation, which has the metric."""
    assert entry.step is not None
    metrics = {key: value for key, value in entry.metrics.items() if key.startswith(EVALUATION)}
    progress = PROGRESS * entry.step // max(total_steps, 1)
    return {"step": entry.step, "value": entry.metrics[metric], "progress": progress, "metrics": metrics}


def request_stop_of(request: Request, reason: str) -> None:
    """Request that a trial saves and stops, if its run has begun. Raises StorageError."""
    assert request.name is not None
    run = read_run(open_storage(request.output).at(RUNS_FOLDER).at(request.name))
    if run is not None:
        run.request_stop(reason)
