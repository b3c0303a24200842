"""Interruptions: what they do depends on the work under way, and none of them leaves a run half-closed.

SIGINT and SIGTERM interrupt, and so do the signals that would otherwise end the process on the spot, without a
checkpoint: SIGHUP of a terminal or connection that goes away, and those that batch systems send before they kill.
SIGQUIT keeps its meaning: it ends a process that answers to nothing else.

Outside training, a signal raises KeyboardInterrupt. While ranks train, the first signal requests a
checkpoint; a second one, or the end of the grace time, gives the ranks up. Work that must not be interrupted
defers signals.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from resnet_dist.errors import INTERRUPTED_EXIT_CODE
from resnet_dist.system.streams import end_log, set_end

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A process may have been started to ignore these, as nohup does with SIGHUP: then it does.
IGNORABLE_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# Time for the current step and its checkpoint; Ray Jobs, Kubernetes and torchrun allow 30 s in all.
GRACE_SECONDS = 20.0
# Signals this close together count as one: a terminal signals each process, and torchrun and uv forward it.
ONE_PRESS_SECONDS = 1.0
# Time for a command that is interrupted to end by itself; a thread or a driver that hangs may prevent it.
EXIT_SECONDS, SECOND_EXIT_SECONDS = 4.0, 0.5


@contextmanager
def handle_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler(count)` for every interruption inside the block; count is 1 for the first signal."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone, so there is nothing to handle here.
        return
    count, last = 0, -ONE_PRESS_SECONDS

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal count, last
        now = time.monotonic()
        if count == 0 or now - last >= ONE_PRESS_SECONDS:
            count, last = count + 1, now
            handler(count)

    before = {number: signal.signal(number, handle) for number in interruptions()}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def interruptions() -> list[signal.Signals]:
    """Return the signals that interrupt this process: without those that it was started to ignore."""
    # None: a handler of C, such as one of faulthandler.
    heeded = (n for n in IGNORABLE_SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None))
    return [*SIGNALS, *heeded]


@contextmanager
def kept_from_children(*numbers: signal.Signals) -> Iterator[None]:
    """Block signals inside the block, also in the processes that are started in it, which keep it so.

    A terminal sends them to a whole group of processes: this one handles them and ends the others. It gets those that
    arrived when the block is left.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def raise_interrupt(count: int) -> None:
    """Raise KeyboardInterrupt for every signal. A handler for `handle_signals`."""
    raise KeyboardInterrupt


class ExitTimer:
    """Ends a command that is interrupted and does not end by itself: a thread or a driver may hang."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def interrupt(self, count: int) -> None:
        """Raise KeyboardInterrupt, and exit soon if that does not end the command. A handler for `handle_signals`."""
        seconds = EXIT_SECONDS if count == 1 else SECOND_EXIT_SECONDS

        def leave() -> None:
            if not self._cancelled.wait(seconds):
                exit_now(INTERRUPTED_EXIT_CODE)

        threading.Thread(target=leave, name="exit", daemon=True).start()
        raise KeyboardInterrupt

    def cancel(self) -> None:
        self._cancelled.set()


def limit_exit(seconds: float, code: int) -> None:
    """Exit with `code` where Python has not ended in `seconds`: at its end it waits for threads that may hang.

    Call it last in the main thread, or from any thread of a process that must end. Python waits for the threads of pools before it marks that thread as ended, so
    its end cannot be what starts the time.
    """

    def leave() -> None:
        time.sleep(seconds)
        exit_now(code)

    threading.Thread(target=leave, name="exit", daemon=True).start()


def exit_at_next_signal() -> None:
    """Exit with 130 at once for a signal from here on: the process is ending after another one."""
    if threading.current_thread() is threading.main_thread():
        for number in interruptions():
            signal.signal(number, lambda *_: exit_now(INTERRUPTED_EXIT_CODE))


def exit_now(code: int) -> NoReturn:
    """Exit without waiting for threads, which may hang."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # closed already
            stream.flush()
    set_end("silent" if code == INTERRUPTED_EXIT_CODE else "named")
    end_log()
    os._exit(code)


def raise_on_second(count: int) -> None:
    """Raise KeyboardInterrupt for the second signal; ignore the first. A handler for `handle_signals`."""
    if count > 1:
        raise KeyboardInterrupt


@contextmanager
def defer_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt for a first signal at the end of the block, and for a second one at once."""
    num_received = 0

    def remember(count: int) -> None:
        nonlocal num_received
        num_received = count
        raise_on_second(count)

    with handle_signals(remember):
        yield
    if num_received:
        raise KeyboardInterrupt


class StopRequest:
    """The stop that signals request of the ranks: the first one a checkpoint, the second one the end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._requested_at: float | None = None
        self._given_up = False

    def request(self, count: int) -> None:
        """Request a checkpoint for the first signal, give up for the second. A handler for `handle_signals`."""
        if count > 1:
            self._given_up = True
        elif self._requested_at is None:
            self._requested_at = self._clock()

    def give_up(self) -> None:
        self._given_up = True

    def requested(self) -> bool:
        return self._requested_at is not None

    def expired(self) -> bool:
        """Report whether to wait no longer for a checkpoint: after a second signal, or GRACE_SECONDS."""
        return self._given_up or (
            self._requested_at is not None and self._clock() - self._requested_at >= GRACE_SECONDS
        )
