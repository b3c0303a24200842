"""Name the rank that is slow: all others wait for it in every step."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from torch import Tensor

from resnet_dist.train.state.step_times import COMPUTE, DATA, own_seconds

SLOW_FACTOR = 1.5  # times the median of a step's own time
SLOW_SECONDS = 60.0  # for so long, before it is reported
REPEAT_SECONDS = 600.0  # between two reports of one rank
MAX_NAMED = 3  # ranks at once


class Stragglers:
    """The ranks that have been slow, from log line to log line. Own time is that without waiting for other ranks.

    Shapes: R ranks, T times, see step_times.py. Of two ranks the faster one is the median.
    """

    def __init__(
        self, hosts: Sequence[str], report: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._hosts, self._report, self._clock = hosts, report, clock
        self._last_look: float | None = None
        self._slow_since: dict[int, float] = {}
        self._reported_at: dict[int, float] = {}

    def restart(self) -> None:
        """Begin anew after what was no training, such as an evaluation, whose time must not count as slow steps."""
        self._last_look = None
        self._slow_since = {}

    def look(self, times_RT: Tensor) -> None:
        """Report the ranks that have been slow in this interval and in those before it for long enough."""
        began, now = self._last_look, self._clock()
        self._last_look = now
        if (
            began is None
        ):  # The first interval of an attempt compiles and fills caches, one after a pause fills them anew.
            return
        own_R = own_seconds(times_RT)
        limit = SLOW_FACTOR * statistics.median_low(own_R)
        slow = [rank for rank, seconds in enumerate(own_R) if seconds > limit]
        self._slow_since = {rank: self._slow_since.get(rank, began) for rank in slow}
        due = [rank for rank in slow if self._is_due(rank, now)]
        due.sort(key=lambda rank: -own_R[rank])
        for rank in due[:MAX_NAMED]:
            self._report(self._describe(rank, times_RT))
        if len(due) > MAX_NAMED:
            self._report(f"and {len(due) - MAX_NAMED} more ranks are slow")
        self._reported_at |= dict.fromkeys(due, now)

    def _is_due(self, rank: int, now: float) -> bool:
        is_long = now - self._slow_since[rank] >= SLOW_SECONDS
        return is_long and now - self._reported_at.get(rank, -math.inf) >= REPEAT_SECONDS

    def _describe(self, rank: int, times_RT: Tensor) -> str:
        own_R = own_seconds(times_RT)
        data, compute = (
            float(times_RT[rank, column]) - statistics.median_low(times_RT[:, column].tolist())
            for column in (DATA, COMPUTE)
        )
        cause = "waiting for data" if data > compute else "computing"
        return (
            f"rank {rank} on {self._hosts[rank]} is slow: {own_R[rank]:.3g} s a step where the median is "
            f"{statistics.median_low(own_R):.3g} s, most of the difference {cause}; the others wait for it"
        )
