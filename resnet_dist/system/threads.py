"""Threads beside a training: pools that do not outlive an interruption, and turns that hold it up for less."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

# Python lets a thread hold the interpreter for 5 ms while others wait. The training thread gives it up in every
# operation of torch, and would wait so long for a thread that uploads metrics, again and again.
TURN_SECONDS = 0.0005


@contextmanager
def short_turns() -> Iterator[None]:
    """Let threads that run Python take turns of TURN_SECONDS inside the block."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def thread_pool(count: int, *closes: Callable[[], None]) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of threads, and wait for them at the end of the block.

    An error or an interruption does not wait: it drops the work that has not begun and calls `closes`, which end
    what the threads wait for.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for close in closes:
            close()
        raise
    pool.shutdown()
