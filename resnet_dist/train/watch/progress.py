"""The phase that a rank is in, written by the loop and read by the watchdog."""

from __future__ import annotations

import time
from collections.abc import Callable

NEXT_BATCH = "waiting for data"  # the phase that begins a step
GATHERING = "gathering the metrics"
# A phase may take this many stall timeouts the first time: compiling, filling a cache and a first fetch take minutes.
FIRST_TIMEOUT_FACTOR = 3
NUM_START_TIMES = 3


class Progress:
    """The phase that this rank is in, and how many phases it has entered.

    All ranks go through the same phases in the same order, so the one that has entered fewest is behind.
    """

    def __init__(self) -> None:
        self.moves = 0
        self.step = 0
        self.phase = "starting"
        self._seen: set[str] = set()
        self._first_step: int | None = None
        # When the first batch was asked for, when it had come, and when the first step was taken, in seconds since 1970.
        self.start_times: list[float] = []
        self.on_first_step: Callable[[], None] = lambda: (
            None
        )  # called by the loop, in the first phase after it

    def at(self, phase: str, step: int | None = None) -> None:
        """Enter a phase. The call is cheap enough for several in every step."""
        self._seen.add(self.phase)
        if self._first_step is None:
            self._first_step = step
        self.phase = phase
        self.step = self.step if step is None else step
        self.moves += 1  # Increase it last, so that a reader of the new number reads its phase too.
        if len(self.start_times) < NUM_START_TIMES:
            self._note_start()

    def _note_start(self) -> None:
        count = len(self.start_times)
        if count == 2 and self.has_stepped:
            self.start_times.append(time.time())
            self.on_first_step()
        elif count < 2 and (self.phase == NEXT_BATCH) == (count == 0):
            self.start_times.append(time.time())

    @property
    def has_stepped(self) -> bool:
        """Report whether this attempt has taken a step, so that it has something to save."""
        return self._first_step is not None and self.step > self._first_step

    @property
    def patience(self) -> int:
        """The number of stall timeouts that this phase may take."""
        return 1 if self.phase in self._seen else FIRST_TIMEOUT_FACTOR
