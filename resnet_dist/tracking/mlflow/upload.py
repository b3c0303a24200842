"""Send the metrics of a spool to MLflow, from a thread that never holds up the training."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection
from typing import Generic, Protocol, TypeVar

from resnet_dist.runs.storage.protocol import Log
from resnet_dist.tracking.backlog import Backlog, Companion, MetricStore
from resnet_dist.tracking.mlflow.run import RunGone
from resnet_dist.tracking.origin import is_of_attempt

POLL_SECONDS = 1.0
# What is written in this time after a request waits for the next one: with SQLite a request takes 10 ms of CPU and 0.1 ms
# for each metric, in which a training in the same process stands still.
SEND_SECONDS = 5.0
MAX_BACKOFF_SECONDS = 30.0
LAST_BACKOFF_SECONDS = 2.0  # once there is nothing to do but to wait: a store that is back must not be missed
LONG_SECONDS = 5.0  # A longer wait is reported.
# A request that fails once is no outage; it is reported when it fails again.
FAILURES_TO_REPORT = 2


class TaggedStore(MetricStore, Protocol):
    """The destination of metrics and tags: an MLflow run."""

    def set_tags(self, tags: dict[str, str]) -> None: ...

    def delete_tags(self, names: Collection[str]) -> None:
        """Delete tags that the store may have."""


Store = TypeVar("Store", bound=TaggedStore)


class Uploader(Generic[Store]):
    """A thread that opens a store and sends it the metrics of a spool; whatever fails is retried.

    open_store: may raise and may never return. explain: the reason of an error, for a person. report: one line when the
    store does not answer, and one when it is back. may_send: asked before each round of requests.
    """

    def __init__(
        self,
        spool: Log,
        open_store: Callable[[], Store],
        explain: Callable[[BaseException], str],
        report: Callable[[str], None],
        may_send: Callable[[], bool] = lambda: True,
        companion: Companion | None = None,
    ) -> None:
        self._backlog = Backlog(spool, companion)
        self._poll_seconds = spool.poll_seconds
        self._open_store, self._explain, self._report = open_store, explain, report
        self._may_send = may_send
        self.store: Store | None = None
        self.first_error: BaseException | None = None  # the error of the first attempt to open the store
        self.has_tried = threading.Event()  # The store was opened, or opening it has failed once.
        self._tags: dict[str, str] = {}
        self._sent_tags: dict[str, str] = {}
        self._failures = 0
        self._next_at = 0.0
        self._is_down = False
        self._all_sent = False
        self._deadline = math.inf
        self._stop = threading.Event()
        # A daemon thread: a server that never answers must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give up: send nothing from here on."""
        self._deadline = -math.inf
        self._stop.set()

    def finish(self, timeout_seconds: float) -> int:
        """Send the rest; return the number of metrics that were not sent in that time (the spool keeps them).

        Returns in time even where the server accepts a request and never answers. Raises StorageError where the spool
        cannot be read, which alone knows the number.
        """
        self._deadline = time.monotonic() + timeout_seconds
        self._stop.set()
        if self._thread.ident is None:  # never started
            return 0
        if self._is_down and timeout_seconds >= LONG_SECONDS:
            self._report(f"waiting for the tracker, at most {timeout_seconds:g} s")
        self._thread.join(timeout_seconds)
        return 0 if self._all_sent and not self._thread.is_alive() else self._backlog.count()

    def num_waiting(self) -> int:
        """Return the number of metrics that the store has not got, as of the last look at the spool."""
        return self._backlog.num_waiting()

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags of the run, when the store answers; those of an attempt before that this one lacks are deleted."""
        kept = {name: text for name, text in self._tags.items() if not is_of_attempt(name)}
        self._tags = {**kept, **tags}

    @property
    def has_tags(self) -> bool:
        """Report whether there are tags that were not sent."""
        return self._sent_tags != self._tags

    def report_down(self, reason: str) -> None:
        """Report once that the store does not answer."""
        if not self._is_down:
            self._is_down = True
            self._report(f"{reason}; training does not wait for it, and the metrics are kept and sent later")

    def _run(self) -> None:
        while not self._stop.wait(self._pause_seconds()):
            self._upload()
        while time.monotonic() < self._deadline and not self._upload():
            threading.Event().wait(max(0.0, min(self._next_at, self._deadline) - time.monotonic()))

    def _pause_seconds(self) -> float:
        pause = max(0.0, self._next_at - time.monotonic())
        return max(POLL_SECONDS, self._poll_seconds, pause) if self.has_tried.is_set() else pause

    def _upload(self) -> bool:
        """Open the store unless it is open, and send all that is new; report whether nothing is left to send."""
        self._all_sent = False
        if not self._may_send():
            self._next_at = time.monotonic() + POLL_SECONDS
            return False
        try:
            if self.store is None:
                self.store = self._open_store()
                self.has_tried.set()
            self._send_tags(self.store)
            num_sent = self._backlog.send(self.store)
        except RunGone:
            self.store, self._sent_tags = None, {}
            self._backlog.start_over()
            self._next_at = time.monotonic() + POLL_SECONDS
            return False
        except Exception as error:  # A server may fail in any way; training continues.
            self._failed(error)
            return False
        if self._is_down:
            self._is_down = False
            self._report(f"the tracker answers again: {num_sent:,} metrics sent")
        if num_sent:
            self._next_at = time.monotonic() + SEND_SECONDS
        self._failures, self._all_sent = 0, True
        return True

    def _send_tags(self, store: Store) -> None:
        tags = self._tags
        if tags != self._sent_tags:
            store.set_tags({name: text for name, text in tags.items() if self._sent_tags.get(name) != text})
            if gone := self._sent_tags.keys() - tags.keys():
                store.delete_tags(gone)
            self._sent_tags = tags

    def _failed(self, error: BaseException) -> None:
        # Explain it first: who waits for `has_tried` asks for the reason.
        reason = self._explain(error)
        if not self.has_tried.is_set():
            self.first_error = error
            self.has_tried.set()
        self._failures += 1
        seconds = min(MAX_BACKOFF_SECONDS, 0.5 * 2.0**self._failures)
        if self._stop.is_set():
            seconds = min(seconds, LAST_BACKOFF_SECONDS)
        self._next_at = time.monotonic() + seconds
        if self._failures >= FAILURES_TO_REPORT:
            self.report_down(reason)
