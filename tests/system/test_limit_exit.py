"""A command that ends with an error does not wait for threads that hang."""

from __future__ import annotations

import subprocess
import sys
import time

PROGRAM = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from resnet_dist.system.signals import limit_exit
pool = ThreadPoolExecutor(1)
pool.submit(time.sleep, 60)
pool.shutdown(wait=False)
limit_exit(0.2, 7)
sys.exit(1)
"""


def test_a_pool_whose_thread_hangs_does_not_hold_the_process() -> None:
    start = time.monotonic()
    ended = subprocess.run([sys.executable, "-c", PROGRAM], timeout=30)
    assert ended.returncode == 7
    assert time.monotonic() - start < 20
