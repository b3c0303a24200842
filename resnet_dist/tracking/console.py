"""Show a run's spool to a person while it grows, and publish a run where MLflow is not installed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from resnet_dist.runs.folder import RunFolder, Status
from resnet_dist.runs.storage.protocol import Log, Unreachable
from resnet_dist.tracking.spool import Entry, Follower

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5  # A look costs a training in the same process 0.1 ms.


class SpoolThread:
    """A thread that shows each new entry of a spool."""

    def __init__(self, spool: Log, on_entry: Callable[[Entry], None]) -> None:
        self._on_entry = on_entry
        self._follower = Follower(spool)
        self._follower.skip()  # The entries of earlier attempts were shown when these ran.
        self._poll_seconds = spool.poll_seconds
        self._failed = self._unreachable = False
        self._stop = threading.Event()
        # A daemon thread: a terminal that takes nothing must not keep the process alive.
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout_seconds: float) -> None:
        """Show the remaining entries; wait no longer than the timeout."""
        self._stop.set()
        if self._thread.ident is not None:  # It has started.
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while not self._stop.wait(max(POLL_SECONDS, self._poll_seconds)):
            self._show()
        self._show()

    def _show(self) -> None:
        try:
            for entry in self._follower.read():
                self._on_entry(entry)
            self._unreachable = False
        except Unreachable as error:  # The next look shows what this one could not read.
            if not self._unreachable:
                log.warning("the metrics cannot be read now: %s", error)
            self._unreachable = True
        except Exception as error:  # A closed terminal must not end the thread.
            if not self._failed:
                log.warning("the metrics are not shown from here on: %s: %s", type(error).__name__, error)
            self._failed = True


class ConsolePublisher:
    """The publisher of a run without MLflow: the spool holds all metrics."""

    run_id = None
    unsent = ()  # The spool is all that there is.

    def __init__(self, spool: Log, on_entry: Callable[[Entry], None]) -> None:
        self._thread = SpoolThread(spool, on_entry)

    def num_waiting(self) -> int:
        return 0

    def start(self) -> None:
        self._thread.start()

    def describe_attempt(self, run: RunFolder) -> None:
        pass  # run.json has it.

    def finish(self, timeout_seconds: float) -> None:
        self._thread.finish(timeout_seconds)

    def log_results(self, checkpoint: str | None) -> None:
        pass  # The checkpoint stays in the run folder.

    def close(self, status: Status, timeout_seconds: float) -> None:
        pass

    def abandon(self) -> None:
        self._thread.finish(0)
