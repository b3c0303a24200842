"""Name the rank that hangs, instead of waiting for it forever.

A rank that hangs (a lost disk, a dead driver, a deadlock) blocks all others in their next collective, where no Python
code runs. So each rank is watched from a thread other than the one that trains: it publishes the position of its rank,
and once nothing has moved for a while it compares with the others. Ranks go through the same phases in the same order:
the one that has entered fewest is behind.

A stall is reported after REPORT_SECONDS, by one rank that answers, and ends the attempt after `timeout_seconds`.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from resnet_dist.errors import TrainingError
from resnet_dist.train.watch.positions import POLLS_TO_ANSWER, Board, Position, Reading, position_of
from resnet_dist.train.watch.progress import Progress
from resnet_dist.train.watch.stall import Stall
from resnet_dist.world import World

POLLS_PER_TIMEOUT = 20
MAX_POLL_SECONDS = 2.0  # between two publications, with few ranks
RANKS_PER_POLL_SECOND = 100  # With many, all that read all would load the store.
# Report a stall so early that a person reads of it within a minute: finding who is behind takes some polls, and the
# report goes through the run's storage.
REPORT_SECONDS = 45.0


class Stalled(TrainingError):
    """The error for ranks that hang. Their threads may never return, so the process must exit without joining them."""


@dataclass(frozen=True)
class StallReport:
    """A stall, or its end, for a person. Ranks that report the same event use the same key."""

    key: str
    line: str
    details: tuple[str, ...] = ()  # stacks


def ignore(report: StallReport) -> None:
    """Drop a report."""


def slowest_poll_seconds(world_size: int) -> float:
    """Return the time between two publications of a rank, unless a short timeout demands less."""
    return max(MAX_POLL_SECONDS, world_size / RANKS_PER_POLL_SECOND)


class Watchdog:
    """The watch over this rank's training thread. Call `look` repeatedly, from another thread.

    report: receives a stall that does not end the attempt yet, and its end, where this rank is to report it. It must
    not wait for a storage.
    """

    def __init__(
        self,
        progress: Progress,
        thread: threading.Thread,
        world: World,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        report: Callable[[StallReport], None] = ignore,
    ) -> None:
        self._progress, self._thread, self._world = progress, thread, world
        self._timeout, self._clock, self._report = timeout_seconds, clock, report
        self.poll_seconds = min(timeout_seconds / POLLS_PER_TIMEOUT, slowest_poll_seconds(world.world_size))
        self._moves = -1
        self._phase = progress.phase
        self._still_for = 0.0
        self._looked_at = clock()
        self._stall: Stall | None = None  # the one that has been reported, by this rank or another one
        self._reports_it = False
        self._report_at = 0.0  # value of `_still_for` at which the next report is due
        # How long the last two passes through each phase took, as far as they were seen.
        self._passes: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=2))
        self._board = Board(world, self.position, self.poll_seconds) if world.world_size > 1 else None

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def position(self, beat: int = 0) -> Position:
        return position_of(self._progress, self._thread, beat)

    def look(self) -> None:
        """Report a stall once; raise Stalled once nothing has moved for as long as the phase may take."""
        now = self._clock()
        # Limit the time between two looks: a machine that slept, or a job that was paused, has not stalled.
        elapsed = min(now - self._looked_at, 2 * self.poll_seconds)
        self._looked_at = now
        if self._progress.moves != self._moves:
            self._begin_phase()
            return
        self._still_for += elapsed
        if self._board is not None:
            self._board.reads = self._still_for > POLLS_TO_ANSWER * self.poll_seconds
        if self._stall is not None:
            self._look_whether_over(self._stall)
        elif self._still_for >= self._report_at:
            self._report_stall()
        allowed = self._timeout * self._progress.patience
        # Ranks stop moving at different moments: wait until each has published where it stands now.
        if self._still_for >= allowed + POLLS_TO_ANSWER * self.poll_seconds:
            reading = self._read()
            known = reading if reading.is_complete else Reading((self.position(),))
            line = Stall.of(known, self._world.rank).describe(allowed)
            raise Stalled(f"{line} (train.stall_timeout_seconds={self._timeout:g})")

    def _begin_phase(self) -> None:
        """Begin to time a phase that was entered since the last look."""
        if self._stall is not None:
            self._report_end(self._stall)
        self._passes[self._phase].append(self._still_for)
        self._moves, self._phase, self._still_for = self._progress.moves, self._progress.phase, 0.0
        self._report_at = self._first_report()
        if self._board is not None:
            self._board.reads = False

    def _first_report(self) -> float:
        """Return after how long to report that this phase stands still.

        A phase that always takes long, such as a forward pass of minutes on a CPU, is no stall. The shorter of its last
        two passes counts, so that one stall does not hide the next.
        """
        usual = 2 * min(self._passes[self._phase], default=0.0)
        return max(min(REPORT_SECONDS, self._timeout / 2) * self._progress.patience, usual)

    def _read(self) -> Reading:
        if self._board is None:
            return Reading((self.position(),))
        reading = self._board.read()
        if reading.store_answers:
            return reading
        here, positions = self.position(), list(reading.positions)
        # Positions that were read before this stall are of use for their hosts alone.
        if positions[self._world.rank].moves != here.moves:
            positions = [replace(position, phase="") for position in positions]
        positions[self._world.rank] = here
        return replace(reading, positions=tuple(positions))

    def _report_stall(self) -> None:
        reading = self._read()
        if not reading.is_complete:
            return
        stall = Stall.of(reading, self._world.rank)
        if reading.writer is None and self._world.rank > 0:
            # Nobody knows who else answers: the lowest rank reports first, and the others find its report.
            late = self._world.rank * self.poll_seconds
            if self._still_for < self._report_at + late:
                return
        self._stall = stall
        self._reports_it = reading.writer in (None, self._world.rank)
        if self._reports_it:
            line = stall.describe(self._still_for)
            self._report(StallReport(self._key(stall, "begin"), line, tuple(stall.stacks())))

    def _look_whether_over(self, stall: Stall) -> None:
        if self._board is not None and stall.is_over(self._read()):
            self._report_end(stall)
            self._report_at = self._still_for + self._first_report()

    def _report_end(self, stall: Stall) -> None:
        self._stall = None
        if self._reports_it:
            self._report(StallReport(self._key(stall, "end"), stall.describe_end(self._still_for)))

    def _key(self, stall: Stall, part: str) -> str:
        """Return the same name on all ranks that may report this event; "begin" comes before "end"."""
        # All ranks that wait have entered the same phase; the others' positions may be unknown.
        moves = self._moves if not stall.reading.store_answers else stall.moves
        who = "all" if stall.of_all else f"rank-{stall.ranks[0]}"
        return f"phase-{moves:08}-{who}-{part}"
