"""A tracker where MLflow is not installed: the spool holds all metrics, and what it gains is shown."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from resnet_dist.runs import Status
from resnet_dist.tracking.spool import Entry, Follower

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2


class PlainTracking:
    run_id = None

    def __init__(self, spool: Path, on_entry: Callable[[Entry], None]) -> None:
        self._on_entry = on_entry
        self._follower = Follower(spool)
        self._follower.skip()  # earlier attempts were shown when they ran
        self._failed = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_seconds: float) -> int:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
        return 0

    def log_results(self, checkpoint: Path | None) -> None:
        pass  # it stays where it is

    def close(self, status: Status, timeout_seconds: float) -> None:
        pass

    def _run(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._show()
        self._show()

    def _show(self) -> None:
        try:
            for entry in self._follower.read():
                self._on_entry(entry)
        except Exception as error:  # such as a terminal that has gone; the spool has them
            if not self._failed:
                log.warning("the metrics are not shown from here on: %s: %s", type(error).__name__, error)
            self._failed = True
