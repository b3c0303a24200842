"""Room on the disk of a shard cache that is full before the cache has reached its limit: shards are evicted for it.

The default limit, 200 GiB, is more than many disks have, and other programs fill them too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from resnet_dist.data.storage.cache.quota import Quota
from resnet_dist.data.storage.retry import Patience, found_no_room
from resnet_dist.errors import StorageError

log = logging.getLogger(__name__)
RETRY_SECONDS = 1.0


class DiskRoom:
    """The room for the shards of a cache. closed: set once nobody needs them any more."""

    def __init__(self, quota: Quota, timeout_seconds: float, closed: threading.Event) -> None:
        self._quota, self._timeout_seconds, self._closed = quota, timeout_seconds, closed
        self._lock = threading.Lock()
        self._is_reported = False

    def used_by(self, write: Callable[[], None], *, path: Path, url: str, num_bytes: int) -> None:
        """Call `write`, which writes the shard to `path`; where the disk is full, evict other shards, and call it again.

        Raises StorageError where there was no room for the timeout, and no shard to evict.
        """
        patience, cache = Patience(url, self._timeout_seconds, self._closed), self._quota
        while True:
            try:
                write()
                return
            except (OSError, StorageError) as error:
                if not found_no_room(error):
                    raise
            if cache.make_room(num_bytes, path):
                self._report()
                continue
            if patience.is_over():
                raise StorageError(
                    f"data.shard_cache={cache.folder}: No space left on device, for {self._timeout_seconds:.0f} s, and no "
                    f"shard there to evict; free some, or set another folder (data.shard_cache_bytes={cache.max_bytes:,})"
                ) from None
            patience.pause(RETRY_SECONDS, f"room on the disk of data.shard_cache={cache.folder}")

    def _report(self) -> None:
        with self._lock:
            first, self._is_reported = not self._is_reported, True
        if first:
            log.warning(
                "data.shard_cache=%s: its disk is full before data.shard_cache_bytes=%s are reached; shards that were used "
                "longest ago are evicted",
                self._quota.folder,
                f"{self._quota.max_bytes:,}",
            )
