"""Pools of threads that do not outlive an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


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
