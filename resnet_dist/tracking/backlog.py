"""The metrics of a spool that a store lacks: each is sent once, whatever the store does, over restarts of the run too."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from resnet_dist.runs.storage.protocol import Log
from resnet_dist.tracking.spool import Entry, Follower

MAX_METRICS_PER_REQUEST = 1000  # MLflow's limit


@dataclass(frozen=True)
class MetricPoint:
    """One value of a metric."""

    key: str
    value: float
    timestamp: int  # milliseconds since 1970
    step: int


class MetricStore(Protocol):
    """The destination of metrics: a run in MLflow, or the files of TensorBoard."""

    def newest_steps(self) -> dict[str, int]:
        """Return the newest step of every metric that the store has."""

    def log_metrics(self, metrics: Sequence[MetricPoint]) -> None:
        """Take at most MAX_METRICS_PER_REQUEST metrics."""


class Companion(Protocol):
    """The part of a spool that a store gets besides metrics, after them."""

    def start_over(self) -> None:
        """Forget what was sent: the store is another one."""

    def add(self, entries: Sequence[Entry]) -> None:
        """Take new entries of the spool."""

    def send(self, store: Any) -> None:
        """Send what is new. What was not sent when it raises is sent by the next call."""

    def __len__(self) -> int:
        """Return the number of things that were not sent."""


class Backlog:
    """The metrics of a spool that a store lacks, from the beginning of the run.

    A metric is sent when its step is greater than the newest step of that name in the store. So neither reading a spool
    again nor the steps that a restart repeats add duplicates.
    """

    def __init__(self, spool: Log, companion: Companion | None = None) -> None:
        self._spool, self._companion = spool, companion
        # Those that were counted while the store has never answered, and nothing was read for it.
        self._counting, self._counter = threading.Lock(), Follower(spool)
        self._counted, self._num_counted = dict[str, int](), 0
        self.start_over()

    def start_over(self) -> None:
        """Send everything from here on: the store is another one."""
        self._follower = Follower(self._spool)
        self._newest: dict[str, int] | None = None
        self._unsent: list[MetricPoint] = []
        if self._companion is not None:
            self._companion.start_over()

    def send(self, store: MetricStore) -> int:
        """Send all that is new; return the number of metrics sent. Raises what the store raises."""
        if self._newest is None:
            self._newest = store.newest_steps()
        self._read(self._newest)
        num_sent = 0
        while self._unsent:
            batch = self._unsent[:MAX_METRICS_PER_REQUEST]
            store.log_metrics(batch)
            del self._unsent[: len(batch)]
            num_sent += len(batch)
        if self._companion:
            self._companion.send(store)
        return num_sent

    def num_waiting(self) -> int:
        """Return the number of metrics that were not sent, from any thread: without those written since the last look."""
        return self._count() if self._newest is None else len(self._unsent)

    def count(self) -> int:
        """Return the number of metrics that were not sent: all of them where the store has not answered yet."""
        if self._newest is None:
            return self._count()
        self._read(self._newest)
        return len(self._unsent)

    def _read(self, newest: dict[str, int]) -> None:
        entries = self._follower.read()
        self._unsent += _metrics_after(newest, entries)
        if self._companion is not None:
            self._companion.add(entries)

    def _count(self) -> int:
        """Return the number of all metrics; a spool is read once, not again for each look."""
        with self._counting:
            self._num_counted += len(_metrics_after(self._counted, self._counter.read()))
            return self._num_counted


def _metrics_after(newest: dict[str, int], entries: list[Entry]) -> list[MetricPoint]:
    """Return the metrics of entries beyond the newest step of each name, which is moved on."""
    fresh = []
    for entry in entries:
        for name, value in entry.metrics.items():
            step = entry.step or 0
            # MLflow stores infinity as 1.8e308, which flattens every chart that contains it.
            if step > newest.get(name, -1) and math.isfinite(value):
                newest[name] = step
                fresh.append(MetricPoint(name, value, entry.time_ms, step))
    return fresh
