"""Send the metrics of a spool to MLflow, from a thread that never holds up the training."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Protocol

from mlflow.entities import Metric

from resnet_dist.runs.storage.protocol import Log
from resnet_dist.tracking.console import SpoolThread
from resnet_dist.tracking.spool import Entry, Follower

log = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 30.0
MAX_METRICS_PER_REQUEST = 1000  # MLflow's limit


class MetricStore(Protocol):
    """The destination of metrics: an MLflow run."""

    def newest_steps(self) -> dict[str, int]: ...

    def log_metrics(self, metrics: list[Metric]) -> None: ...


class Uploader:
    """A thread that uploads the metrics of a spool that the store lacks, from the beginning of the run.

    A metric is sent when its step is greater than the newest step of that name in the store. So neither
    reading a spool again nor the steps that a restart repeats add duplicates. A request that fails is
    retried.
    """

    def __init__(self, spool: Log, store: MetricStore, on_entry: Callable[[Entry], None]) -> None:
        self._spool, self._store = spool, store
        self._uploads = Follower(spool)
        self._newest: dict[str, int] | None = None
        self._unsent: list[Metric] = []
        self._failures = 0
        self._retry_at = 0.0
        self._last_error = ""
        self._deadline = math.inf
        self._thread = SpoolThread(
            spool, on_entry, after_read=self._upload_when_due, at_end=self._upload_the_rest
        )

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_seconds: float) -> int:
        """Send the rest; return the number of metrics that were not sent in that time (the spool keeps them).

        Returns in time even where the server accepts a request and never answers.
        """
        self._deadline = time.monotonic() + timeout_seconds
        self._thread.finish(timeout_seconds)
        if not self._thread.has_started:
            return 0
        unsent = self._count_unsent()
        if unsent:
            reason = self._last_error or f"no answer within {timeout_seconds:g} s"
            log.warning("%d metrics could not be sent: %s", unsent, reason)
        return unsent

    def _upload_when_due(self) -> None:
        if time.monotonic() >= self._retry_at:
            self._upload()

    def _upload_the_rest(self) -> None:
        while not self._upload() and time.monotonic() < self._deadline:
            threading.Event().wait(max(0.0, min(self._retry_at, self._deadline) - time.monotonic()))

    def _upload(self) -> bool:
        """Send all that is new; report whether nothing is left to send."""
        try:
            if self._newest is None:
                self._newest = self._store.newest_steps()
            self._unsent += self._new_metrics(self._newest)
            while self._unsent:
                self._store.log_metrics(self._unsent[:MAX_METRICS_PER_REQUEST])
                del self._unsent[:MAX_METRICS_PER_REQUEST]
            self._failures, self._last_error = 0, ""
            return True
        except Exception as error:  # A server may fail in any way; training continues.
            self._failures += 1
            self._last_error = f"{type(error).__name__}: {error}"
            self._retry_at = time.monotonic() + min(MAX_BACKOFF_SECONDS, 0.5 * 2.0**self._failures)
            return False

    def _count_unsent(self) -> int:
        if self._newest is not None:
            return len(self._unsent)
        entries = Follower(self._spool).read()  # The store never answered, so count every metric as unsent.
        return sum(len(entry.metrics) for entry in entries)

    def _new_metrics(self, newest: dict[str, int]) -> list[Metric]:
        fresh = []
        for entry in self._uploads.read():
            for name, value in entry.metrics.items():
                step = entry.step or 0
                # MLflow stores infinity as 1.8e308, which flattens every chart that contains it.
                if step > newest.get(name, -1) and math.isfinite(value):
                    newest[name] = step
                    fresh.append(Metric(name, value, entry.time_ms, step))
        return fresh
