"""Send the metrics of a spool to one more store, from a thread that never holds up the training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from resnet_dist.runs.folder import RunFolder
from resnet_dist.tracking.backlog import Backlog, MetricStore

POLL_SECONDS = 1.0
RETRY_SECONDS = 5.0


class FileStore(MetricStore, Protocol):
    """A store beside MLflow."""

    @property
    def place(self) -> str:
        """Its place or address, for messages, without a password."""

    def close(self) -> None:
        """End it, when everything was sent. May raise."""


Open = Callable[[RunFolder], FileStore]


class Sender:
    """A thread that opens a store and sends it the spool of a run; whatever fails is reported once and tried again."""

    def __init__(self, name: str, run: RunFolder, open_store: Open, report: Callable[[str], None]) -> None:
        self._name, self._run, self._open_store, self._report = name, run, open_store, report
        self._backlog = Backlog(run.spool)
        self._store: FileStore | None = None
        self._failed = self._all_sent = False
        self._deadline, self._stop = float("inf"), threading.Event()
        # A daemon thread: a disk that hangs forever must not keep the process alive.
        self._thread = threading.Thread(target=self._send_all, name=f"also {name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Give up: send nothing from here on."""
        self._deadline = 0.0
        self._stop.set()

    def finish(self, timeout_seconds: float) -> str | None:
        """Send the rest and close the store, for no longer than the timeout; return what was not sent, in words."""
        self._deadline = time.monotonic() + timeout_seconds
        self._stop.set()
        if self._thread.ident is not None:  # It has started.
            self._thread.join(timeout_seconds)
        if self._all_sent and not self._thread.is_alive():
            return None
        return f"{self._backlog.num_waiting() or 'some'} metrics to {self._name}"

    def _send_all(self) -> None:
        while not self._stop.wait(
            RETRY_SECONDS if self._failed else max(POLL_SECONDS, self._run.spool.poll_seconds)
        ):
            self._send()
        while time.monotonic() < self._deadline and not self._send(close=True):
            threading.Event().wait(max(0.0, min(RETRY_SECONDS, self._deadline - time.monotonic())))

    def _send(self, *, close: bool = False) -> bool:
        """Send all that is new; report whether nothing is left."""
        try:
            self._run.check_lease()  # After a pause of this process another driver may write the run.
            if self._store is None:
                self._store = self._open_store(self._run)
            self._backlog.send(self._store)
            if close:
                self._store.close()
        except Exception as error:  # A disk or a server may fail in any way; training continues.
            if not self._failed:
                place = f" at {self._store.place}" if self._store is not None else ""
                self._report(f"{self._name}{place}: {type(error).__name__}: {error}; it is tried again")
            # The store may have taken a part, and its writer may be broken: it is read again.
            if self._store is not None:
                with suppress(Exception):
                    self._store.close()
            self._store, self._failed, self._all_sent = None, True, False
            self._backlog.start_over()
            return False
        self._failed, self._all_sent = False, True
        return True
