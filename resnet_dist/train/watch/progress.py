"""The phase that a rank is in, written by the loop and read by the watchdog."""

from __future__ import annotations

NEXT_BATCH = "waiting for data"  # the phase that begins a step
GATHERING = "gathering the metrics"
FIRST_TIME = 3  # factor on the timeout: compiling, filling a cache and a first fetch take minutes, once


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

    def at(self, phase: str, step: int | None = None) -> None:
        """Enter a phase. The call is cheap enough for several in every step."""
        self._seen.add(self.phase)
        if self._first_step is None:
            self._first_step = step
        self.phase = phase
        self.step = self.step if step is None else step
        self.moves += 1  # increased last: a reader of the new number reads its phase too

    @property
    def has_stepped(self) -> bool:
        """Report whether this attempt has taken a step, so that it has something to save."""
        return self._first_step is not None and self.step > self._first_step

    @property
    def patience(self) -> int:
        """The factor on the stall timeout that this phase is allowed."""
        return 1 if self.phase in self._seen else FIRST_TIME
