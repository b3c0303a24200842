"""The phase that a rank is in, written by the loop and read by the watchdog."""

from __future__ import annotations

NEXT_BATCH = "waiting for data"  # the phase that begins a step
GATHERING = "gathering the metrics"
# A phase may take this many stall timeouts the first time: compiling, filling a cache and a first fetch take minutes.
FIRST_TIMEOUT_FACTOR = 3


def collective_timeout_seconds(stall_timeout_seconds: float) -> float:
    """Return the timeout of every collective: longer than the watchdog's, which names the rank that is behind.

    A collective that gives up names nobody.
    """
    return 2 * FIRST_TIMEOUT_FACTOR * stall_timeout_seconds


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
        self.moves += 1  # Increase it last, so that a reader of the new number reads its phase too.

    @property
    def has_stepped(self) -> bool:
        """Report whether this attempt has taken a step, so that it has something to save."""
        return self._first_step is not None and self.step > self._first_step

    @property
    def patience(self) -> int:
        """The number of stall timeouts that this phase may take."""
        return 1 if self.phase in self._seen else FIRST_TIMEOUT_FACTOR
