"""Where a rank is in the program, written by the loop and read by whoever watches it."""

from __future__ import annotations

NEXT_BATCH = "waiting for data"  # the phase that begins a step
GATHERING = "gathering the metrics"
FIRST_TIME = 3  # compiling, filling a cache and a first fetch take minutes, once


class Progress:
    """The phase that this rank is in, and how many it has entered.

    All ranks go through the same phases in the same order, so the one that has entered fewest is behind.
    """

    def __init__(self) -> None:
        self.moves = 0
        self.step = 0
        self.phase = "starting"
        self._seen: set[str] = set()

    def at(self, phase: str, step: int | None = None) -> None:
        """Enter a phase. It is cheap enough for several in every step."""
        self._seen.add(self.phase)
        self.phase = phase
        self.step = self.step if step is None else step
        self.moves += 1  # last: who reads a new number reads its phase too

    @property
    def patience(self) -> int:
        """How many times the usual timeout this phase may take."""
        return 1 if self.phase in self._seen else FIRST_TIME
