"""Watch an attempt on Ray from the driver: a start that is late, and a cluster that has changed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from resnet_dist.errors import StorageError
from resnet_dist.launch.on_ray.placement.changes import ClusterWatch
from resnet_dist.launch.on_ray.placement.fit import Placement
from resnet_dist.launch.on_ray.placement.held import free_and_held, ranks_are_placed
from resnet_dist.runs.folder import RunFolder

LONG_START_SECONDS = 60.0  # A start that takes longer is reported.


class Change:
    """Requests a checkpoint and the end of the ranks where the cluster changes so that they should start again."""

    def __init__(
        self, folder: RunFolder, placement: Placement, sizes: Sequence[int], report: Callable[[str], None]
    ) -> None:
        self.reason: str | None = None
        self.seen_at: float | None = None  # in seconds since 1970
        self._folder, self._report = folder, report
        self._hosts: list[str] = []
        self._watch = ClusterWatch(placement, sizes, self._find_hosts)

    def look(self) -> None:
        if self.reason is not None:
            return
        try:
            reason = self._watch.look()
        except Exception:  # Ray raises several types where its head does not answer; then `fit()` ends too.
            return
        if reason:
            self.reason, self.seen_at = reason, time.time()
            self._report(f"{reason}: saving a checkpoint")
            request_stop_of(self._folder, self._report)

    def _find_hosts(self) -> list[str]:
        if not self._hosts and (ranks := self._folder.ranks()) and ranks.attempt == self._folder.attempt:
            self._hosts = ranks.nodes
        return self._hosts


def request_stop_of(folder: RunFolder, report: Callable[[str], None]) -> None:
    """Request a stop of the ranks through the storage of their run; report where it cannot be written."""
    try:
        folder.request_stop()
    except StorageError as error:
        report(f"the ranks could not be asked to save: {error}")


class StartWatch:
    """Reports once what ranks wait for, where none has begun after LONG_START_SECONDS: places, or their own start."""

    def __init__(self, folder: RunFolder, placement: Placement, report: Callable[[str], None]) -> None:
        self._folder, self._placement, self._report = folder, placement, report
        self._end_before = folder.spool.end()
        self._late_at = time.monotonic() + LONG_START_SECONDS
        self._begun, self._look_at = False, 0.0

    def have_begun(self) -> bool:
        now = time.monotonic()
        if not self._begun and now >= self._look_at:
            self._look_at = now + self._folder.storage.poll_seconds
            try:
                self._begun = self._folder.spool.end() != self._end_before
            except StorageError:  # It is not known: give the ranks time to save.
                return True
        return self._begun

    def report_if_late(self) -> None:
        if time.monotonic() <= self._late_at:
            return
        self._late_at = math.inf
        if not self.have_begun():
            workers, each = self._placement.workers, self._placement
            waits = (
                f"all {workers} have their places, with {each} each, and are starting"
                if ranks_are_placed()
                else f"{workers} wait for {each} each; {free_and_held()}"
            )
            self._report(f"no rank has begun after {LONG_START_SECONDS:g} s: {waits}")
