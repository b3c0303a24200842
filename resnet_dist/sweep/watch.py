"""The trials that run, as the driver of a sweep knows them, and the stops that are requested of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from resnet_dist.driver.request import Request
from resnet_dist.errors import StorageError
from resnet_dist.sweep.plan import Outcome
from resnet_dist.sweep.trial import request_stop_of

# Between two requests of a stop: a run that is just beginning, or starts again, removes the request.
REPEAT_SECONDS = 1.0


class Watch:
    """Follows the trials of a sweep; its methods may be called from any thread."""

    def __init__(
        self,
        requests: Mapping[str, Request],
        metric: str,
        stop_file: Path,
        report: Callable[[str], None],
        on_end: Callable[[str, Outcome], None],
    ) -> None:
        """Follow the trials of `requests`, by name. report: receives lines for the person.

        stop_file: exists once no trial may begin any more.
        """
        self._requests, self._metric, self._stop_file = requests, metric, stop_file
        stop_file.unlink(missing_ok=True)
        self._report, self._on_end = report, on_end
        self._running: set[str] = set()
        self._stops: dict[str, str] = {}  # the reasons by trial
        self._stops_all = False
        self._repeat_at = 0.0
        self._lock = threading.Lock()

    @property
    def is_stopped(self) -> bool:
        """Report whether no trial may start any more and none runs."""
        with self._lock:
            return self._stops_all and not self._running

    def started(self, name: str) -> None:
        with self._lock:
            self._running.add(name)

    def reported(self, name: str, report: Mapping[str, Any]) -> None:
        """Take a report of a trial, see TrialRun."""
        for note in report.get("notes", ()):
            self._report(f"{name}: {note}")
        if not report.get("done"):
            self._report(f"{name}: step {report['step']}  {self._metric} {report['value']:.4g}")
        elif "outcome" in report:
            self.ended(name, Outcome(**report["outcome"]))
        else:
            self._forget(name)

    def ended(self, name: str, outcome: Outcome) -> None:
        self._forget(name)
        self._on_end(name, outcome)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._running.discard(name)
            self._stops.pop(name, None)

    def stop(self, name: str, reason: str) -> None:
        """Stop a trial, with a checkpoint, for a reason that its page shows."""
        with self._lock:
            self._stops.setdefault(name, reason)

    def stop_all(self) -> None:
        """Stop all trials, each with a checkpoint; none begins any more."""
        with suppress(OSError):  # The trials that begin are then stopped at their first step.
            self._stop_file.touch()
        self._stops_all = True

    def request_stops(self) -> None:
        """Request the stops that are due, at most every REPEAT_SECONDS. Never raises."""
        if time.monotonic() < self._repeat_at:
            return
        with self._lock:
            names = self._running if self._stops_all else self._running & set(self._stops)
            due = {name: "" if self._stops_all else self._stops[name] for name in names}
        if due:
            self._repeat_at = time.monotonic() + REPEAT_SECONDS
        for name, reason in due.items():
            with suppress(StorageError):  # The next request may be written.
                request_stop_of(self._requests[name], reason)
