"""Follow the spool and bring its metrics to MLflow, beside the training and never in its way."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mlflow.entities import Metric

from resnet_dist.tracking.console import SpoolThread
from resnet_dist.tracking.spool import Entry, Follower

log = logging.getLogger(__name__)

MAX_BACKOFF_SECONDS = 30.0
BATCH = 1000  # metrics in one request: MLflow's limit


class MetricStore(Protocol):
    """Where metrics go: an MLflow run."""

    def newest_steps(self) -> dict[str, int]: ...

    def log_metrics(self, metrics: list[Metric]) -> None: ...


class Uploader:
    """A thread that uploads what the spool holds and the store lacks, from the beginning of the run on.

    A metric is sent when its step is beyond the newest the store has of that name: replaying a spool, or the
    steps that a restart runs again, adds nothing. Whatever fails is kept and tried again.
    """

    def __init__(self, spool: Path, store: MetricStore, on_entry: Callable[[Entry], None]) -> None:
        self._spool, self._store = spool, store
        self._uploads = Follower(spool)
        self._newest: dict[str, int] | None = None
        self._unsent: list[Metric] = []
        self._failures = 0
        self._retry_at = 0.0
        self._last_error = ""
        self._deadline = math.inf
        self._thread = SpoolThread(
            spool, on_entry, after_look=self._upload_when_due, at_end=self._upload_the_rest
        )

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_seconds: float) -> int:
        """Send the rest; return how many metrics were not sent in that time (the spool keeps them).

        It takes no longer, even where a server has accepted a request and never answers.
        """
        self._deadline = time.monotonic() + timeout_seconds
        self._thread.finish(timeout_seconds)
        if not self._thread.has_started:
            return 0
        unsent = self._count_unsent()
        if unsent:
            why = self._last_error or f"no answer within {timeout_seconds:g} s"
            log.warning("%d metrics could not be sent: %s", unsent, why)
        return unsent

    def _upload_when_due(self) -> None:
        if time.monotonic() >= self._retry_at:
            self._upload()

    def _upload_the_rest(self) -> None:
        while not self._upload() and time.monotonic() < self._deadline:
            threading.Event().wait(max(0.0, min(self._retry_at, self._deadline) - time.monotonic()))

    def _upload(self) -> bool:
        """True when nothing is left to send."""
        try:
            if self._newest is None:
                self._newest = self._store.newest_steps()
            self._unsent += self._new_metrics(self._newest)
            while self._unsent:
                self._store.log_metrics(self._unsent[:BATCH])
                del self._unsent[:BATCH]
            self._failures, self._last_error = 0, ""
            return True
        except Exception as error:  # a server may fail in any way; training goes on
            self._failures += 1
            self._last_error = f"{type(error).__name__}: {error}"
            self._retry_at = time.monotonic() + min(MAX_BACKOFF_SECONDS, 0.5 * 2.0**self._failures)
            return False

    def _count_unsent(self) -> int:
        if self._newest is not None:
            return len(self._unsent)
        entries = Follower(self._spool).read()  # what the store has of them it could not say
        return sum(len(entry.metrics) for entry in entries)

    def _new_metrics(self, newest: dict[str, int]) -> list[Metric]:
        fresh = []
        for entry in self._uploads.read():
            for name, value in entry.metrics.items():
                step = entry.step or 0
                # MLflow turns infinities into 1.8e308, which flattens every chart they are in.
                if step > newest.get(name, -1) and math.isfinite(value):
                    newest[name] = step
                    fresh.append(Metric(name, value, entry.time_ms, step))
        return fresh
