"""Counts of workers on a Ray cluster, for the bar of their driver: each writes its own to Ray's head, about once a second."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field

from ray.experimental import internal_kv

NAMESPACE = b"resnet_dist"
WORKERS_PER_SECOND = 100  # that write at the same time: the head serves all jobs of a cluster


@dataclass
class Count:
    """The count of one worker: a plain value until it is called in that worker."""

    key: bytes
    interval_seconds: float
    _write_at: float = field(default=0.0, init=False)

    def __call__(self, done: int) -> None:
        """Write the count, unless the last one is very new. A head that does not answer costs a bar, and no result."""
        now = time.monotonic()
        if now >= self._write_at:
            self._write_at = now + self.interval_seconds
            with suppress(Exception):
                internal_kv._internal_kv_put(self.key, str(done), namespace=NAMESPACE)


class Counts:
    """The counts of some workers, as their driver reads them."""

    def __init__(self, num_workers: int) -> None:
        prefix = uuid.uuid4().hex
        interval = max(1.0, num_workers / WORKERS_PER_SECOND)
        self.of_workers = [Count(f"{prefix}/{number}".encode(), interval) for number in range(num_workers)]
        self._prefix, self._interval = prefix, interval
        self._read_at, self._sum = 0.0, 0

    def total(self) -> int:
        """Return the sum of the counts, of which each is some seconds old at most."""
        now = time.monotonic()
        if now >= self._read_at:
            self._read_at = now + self._interval
            with suppress(Exception):  # The next look may succeed.
                keys = [count.key for count in self.of_workers]
                found = internal_kv.internal_kv_get_gcs_client().internal_kv_multi_get(keys, NAMESPACE)
                self._sum = sum(map(int, found.values()))
        return self._sum

    def close(self) -> None:
        """Remove the counts from the head."""
        with suppress(Exception):  # They are a few bytes.
            internal_kv._internal_kv_del(self._prefix, del_by_prefix=True, namespace=NAMESPACE)
