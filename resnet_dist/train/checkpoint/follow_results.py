"""Evaluations that another process makes of this run's checkpoints, as rank 0 sees them.

A thread looks for results and logs each at the step of its checkpoint, in the order of the steps. Training never waits
for them; which checkpoint is the best, and which ones still await their evaluation, is known to what writes and removes
checkpoints.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from resnet_dist.errors import StorageError
from resnet_dist.runs.evaluation_results import Evaluated, EvaluationResults
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.train.state.train_state import Best
from resnet_dist.train.tracker import Tracker

CLOSE_SECONDS = 5.0


class ResultsFollower:
    """The evaluations of one attempt. Any thread may call it."""

    def __init__(
        self,
        results: EvaluationResults,
        tracker: Tracker,
        best_metric: str | None,
        logged: Collection[int],
        poll_seconds: float,
    ) -> None:
        """Follow the results. logged: steps whose metrics the run's spool has already."""
        self._results, self._tracker, self._best_metric = results, tracker, best_metric
        self._logged, self._poll_seconds = set(logged), poll_seconds
        self._awaited: set[int] = set()
        self._best: Best | None = None
        self._metrics: dict[str, float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="evaluations", daemon=True)

    def evaluated(self) -> set[int]:
        """Return the steps that have a result. Raises StorageError."""
        return {result.step for result in self._results.read()}

    def start(self, best: Best | None, awaited: Iterable[int]) -> None:
        """Begin with what the restored checkpoint and those beside it state. Raises StorageError."""
        self._best = best
        self._awaited |= set(awaited)
        self.look()
        self._thread.start()

    def add(self, step: int) -> None:
        """Keep the checkpoint of this step until it is evaluated."""
        with self._lock:
            self._awaited.add(step)

    def kept_steps(self) -> set[int]:
        """Return the steps whose checkpoints may not be removed: those that await an evaluation, and the best."""
        with self._lock:
            return self._awaited | ({self._best.step} if self._best is not None else set())

    def completed(self, scalars: dict[str, Any]) -> dict[str, Any]:
        """Return the scalars of a checkpoint with the results that are known by now."""
        with self._lock:
            best = asdict(self._best) if self._best is not None else None
            return {**scalars, "best": best, "metrics": {**scalars["metrics"], **self._metrics}}

    def look(self) -> None:
        """Take the results that are new. Raises StorageError."""
        for result in self._results.read():
            if self._closed.is_set():  # The driver logs the rest.
                return
            with self._lock:
                self._awaited.discard(result.step)
                self._best = better(self._best, result, self._best_metric)
                self._metrics.update(result.metrics)
                is_new = result.step not in self._logged
                self._logged.add(result.step)
            if is_new and result.problem is None:
                self._tracker.log(dict(result.metrics), result.step)

    def close(self) -> None:
        """End the thread, which may be waiting for an answer of the storage: no longer than CLOSE_SECONDS."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        reported = ""
        while not self._closed.wait(self._poll_seconds):
            try:
                self.look()
            except StorageError as error:  # The next look may succeed.
                if str(error) != reported:
                    reported = str(error)
                    self._tracker.note(f"results of evaluations beside training wait: {error}")


@contextmanager
def following(
    run: Storage, tracker: Tracker, best_metric: str | None, logged: Collection[int] | None
) -> Iterator[ResultsFollower | None]:
    """Yield the evaluations beside an attempt, closed at the end; None where `logged` is."""
    if logged is None:
        yield None
        return
    follower = ResultsFollower(EvaluationResults(run), tracker, best_metric, logged, run.poll_seconds)
    try:
        yield follower
    finally:
        follower.close()


def better(best: Best | None, result: Evaluated, metric: str | None) -> Best | None:
    """Return the best of the results so far and one more."""
    if metric is None or metric not in result.metrics:
        return best
    return Best.after(best, metric, result.metrics[metric], result.step)
