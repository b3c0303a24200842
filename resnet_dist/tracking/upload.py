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

from resnet_dist.tracking.spool import Entry, Follower

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
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
        self._store, self._on_entry = store, on_entry
        self._uploads, self._display = Follower(spool), Follower(spool)
        self._display.skip()  # earlier attempts were shown when they ran
        self._newest: dict[str, int] | None = None
        self._unsent: list[Metric] = []
        self._failures = 0
        self._retry_at = 0.0
        self._last_error = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_seconds: float) -> int:
        """Send what is left; returns how many metrics could not be sent in that time (the spool keeps them)."""
        self._stop.set()
        self._thread.join()
        deadline = time.monotonic() + timeout_seconds
        while not self._upload(force=True) and time.monotonic() < deadline:
            self._wait_until(min(self._retry_at, deadline))
        if self._unsent:
            log.warning("%d metrics could not be sent: %s", len(self._unsent), self._last_error)
        return len(self._unsent)

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._show()
            self._upload()
        self._show()

    def _show(self) -> None:
        for entry in self._display.read():
            self._on_entry(entry)

    def _upload(self, *, force: bool = False) -> bool:
        """True when nothing is left to send."""
        if not force and time.monotonic() < self._retry_at:
            return False
        try:
            if self._newest is None:
                self._newest = self._store.newest_steps()
            self._unsent += self._new_metrics(self._newest)
            while self._unsent:
                self._store.log_metrics(self._unsent[:BATCH])
                del self._unsent[:BATCH]
            self._failures = 0
            return True
        except Exception as error:  # a server may fail in any way; training goes on
            self._failures += 1
            self._last_error = f"{type(error).__name__}: {error}"
            self._retry_at = time.monotonic() + min(MAX_BACKOFF_SECONDS, 0.5 * 2.0**self._failures)
            return False

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

    def _wait_until(self, moment: float) -> None:
        threading.Event().wait(max(0.0, moment - time.monotonic()))
