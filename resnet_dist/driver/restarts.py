"""Restarts inside one submission: ranks that the machines took away start again; mistakes and defects end the run.

Every start of the ranks is an attempt of the run with a number of its own, and resumes from the newest checkpoint.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import TypeVar

from resnet_dist.errors import RankFailed, RanksLost, StorageError
from resnet_dist.launch.attempt import ClusterChanged, RankLauncher
from resnet_dist.launch.start_times import BEGIN, ENDED
from resnet_dist.runs.folder import Restarted, RunFolder, failure_name
from resnet_dist.runs.storage.protocol import Unreachable
from resnet_dist.system.redact import redact
from resnet_dist.train.checkpoint.folder import list_checkpoints, step_of
from resnet_dist.train.loop import Outcome

Value = TypeVar("Value")
log = logging.getLogger(__name__)

WINDOW_SECONDS = 3600.0  # in which restarts are counted
# Ranks that are lost so often without one more checkpoint are lost by what they compute: memory, a defect.
MAX_WITHOUT_PROGRESS = 3
# A storage that does not answer when ranks are to start again: how long it is tried, and the pause between two tries.
PATIENCE_SECONDS, RETRY_SECONDS = 300.0, 2.0


@dataclass(frozen=True)
class Restart:
    """One start of the ranks after the first, with its cause."""

    cause: str
    step: int  # of the checkpoint that it begins with; 0: of none
    time: float  # of the loss, on the driver's clock
    planned: bool  # The cluster changed or took a node away after a notice: not counted.
    begun: bool = True  # The code of the ranks ran: what it computes may be the cause.


class Restarts:
    """The restarts of a run so far, and the limits that end it."""

    def __init__(self, max_restarts: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Allow `max_restarts` within WINDOW_SECONDS; 0 ends the run at its first loss."""
        self.max_restarts = max_restarts
        self.past: list[Restart] = []
        self._clock = clock

    def add(self, cause: Exception, step: int) -> Restart:
        """Count a restart from the checkpoint of `step`. Raises RankFailed where a limit is reached."""
        planned = isinstance(cause, ClusterChanged) or (isinstance(cause, RanksLost) and cause.preempted)
        restart = Restart(str(cause), step, self._clock(), planned, getattr(cause, "begun", True))
        details = getattr(cause, "details", "")
        recent = [past for past in self._counted() if restart.time - past.time < WINDOW_SECONDS]
        if not planned and len(recent) >= self.max_restarts:
            limit = f"{self.max_restarts} within an hour" if self.max_restarts else "0"
            raise RankFailed(f"{cause}; it was not restarted (--max-restarts: {limit})", details)
        stuck = [past for past in self._counted() if past.step == step and past.begun]
        if not planned and restart.begun and len(stuck) >= MAX_WITHOUT_PROGRESS - 1:
            raise RankFailed(
                f"{cause}; ranks were lost {MAX_WITHOUT_PROGRESS} times after step {step}, without one more checkpoint",
                details,
            )
        self.past.append(restart)
        return restart

    def _counted(self) -> list[Restart]:
        return [past for past in self.past if not past.planned]


def launch_with_restarts(
    run: RunFolder,
    launch: RankLauncher,
    restarts: Restarts,
    begin: Callable[[RunFolder, Restart], None],
    report: Callable[[str], None] = log.warning,
) -> tuple[RunFolder, Outcome | None]:
    """Run attempts until one ends by itself; return the run as of its last attempt, and that attempt's outcome.

    begin: called before each restart, with the run as of its next attempt. Raises TrainingError for a mistake,
    RankFailed for a defect, and where the restarts are used up; Unreachable where the run's storage does not answer for
    PATIENCE_SECONDS: what takes ranks away often takes the storage away too.
    """
    run = replace(run, marks={BEGIN: time.time()})
    while True:
        try:
            return run, launch(run)
        except (RankFailed, ClusterChanged) as cause:
            keep_details(run, cause)
            if isinstance(cause, RankFailed) and not isinstance(cause, RanksLost):
                raise
            ended_at, seen_at = time.time(), getattr(cause, "seen_at", None)
            restart = restarts.add(cause, patiently(partial(newest_step, run), report))
        number = run.attempt + 1
        run = replace(
            run,
            attempt=number,
            token=uuid.uuid4().hex,
            restarts=(*run.restarts, Restarted(number, redact(restart.cause), restart.step)),
            marks={BEGIN: seen_at or ended_at, ENDED: ended_at},
        )
        patiently(run.write, report)
        begin(run, restart)


def patiently(
    call: Callable[[], Value], report: Callable[[str], None], seconds: float | None = None
) -> Value:
    """Return what `call` returns; while the storage does not answer, call again for `seconds`, or PATIENCE_SECONDS."""
    seconds = PATIENCE_SECONDS if seconds is None else seconds
    deadline, reported = time.monotonic() + seconds, False
    while True:
        try:
            return call()
        except Unreachable as error:
            if time.monotonic() >= deadline:
                raise
            if not reported:
                report(f"{error}; waiting for it, for up to {seconds:.0f} s")
                reported = True
        time.sleep(RETRY_SECONDS)


def keep_details(run: RunFolder, cause: Exception) -> None:
    """Write everything that is known of a failure into a file of the run; it may be hundreds of lines."""
    if details := getattr(cause, "details", ""):
        title = f"{datetime.now():%Y-%m-%d %H:%M:%S}  attempt {run.attempt}: {cause}"
        with suppress(StorageError):  # A full disk must not hide the failure itself.
            run.check_lease()
            run.storage.write(failure_name(run.attempt), redact(f"{title}\n{details}\n").encode())


def newest_step(run: RunFolder) -> int:
    """Return the step of the newest checkpoint of a run, or 0."""
    checkpoints = list_checkpoints(run.checkpoints)
    return step_of(checkpoints[-1]) if checkpoints else 0
