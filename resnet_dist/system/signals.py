"""SIGINT and SIGTERM: what they mean depends on what is under way, and no run is left half-closed by one.

Outside the training they are KeyboardInterrupt. While ranks train, the first one asks for a checkpoint, and a
second one, or the end of the grace time, gives up. What must not be cut in two holds them back.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = (
    20.0  # for the step under way and its checkpoint; Ray Jobs, Kubernetes and torchrun allow 30 in all
)
ONE_PRESS_SECONDS = 1.0  # a terminal signals all its processes, and torchrun or uv pass the same one on


@contextmanager
def signals_call(ask: Callable[[int], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM call `ask(count)`, 1 for the first."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread: whoever runs us in another has his own way to stop
        return
    count, last = 0, -ONE_PRESS_SECONDS

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count, last
        now = time.monotonic()
        if count == 0 or now - last >= ONE_PRESS_SECONDS:
            count, last = count + 1, now
            ask(count)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(count: int) -> None:
    raise KeyboardInterrupt


def interrupt_second(count: int) -> None:
    if count > 1:
        raise KeyboardInterrupt


@contextmanager
def signals_held() -> Iterator[None]:
    """Inside, a first signal waits for the end and is KeyboardInterrupt there; a second is so at once."""
    held = 0

    def hold(count: int) -> None:
        nonlocal held
        held = count
        if count > 1:
            raise KeyboardInterrupt

    with signals_call(hold):
        yield
    if held:
        raise KeyboardInterrupt


class StopRequest:
    """What signals ask of the ranks: `asked` first, then `over`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_at: float | None = None
        self._given_up = False

    def ask(self, count: int) -> None:
        if count > 1:
            self._given_up = True
        elif self._asked_at is None:
            self._asked_at = self._clock()

    def give_up(self) -> None:
        self._given_up = True

    def asked(self) -> bool:
        return self._asked_at is not None

    def over(self) -> bool:
        """Whether to wait no longer for a checkpoint."""
        return self._given_up or (
            self._asked_at is not None and self._clock() - self._asked_at >= GRACE_SECONDS
        )
