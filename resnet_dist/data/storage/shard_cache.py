"""URLs → local files: remote and compressed shards are fetched whole into a cache that a node's ranks share.

A plain tar on this machine is used where it lies. A broken transfer is resumed; a fetched file gets its final name
only after its size and checksum are verified; beyond a limit of bytes the least recently used shards are evicted.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from resnet_dist.data.storage.cache.fetch import Fetcher
from resnet_dist.data.storage.cache.folder import LOCK, SUM, TAR, CacheLimits, cached_path, mark_used
from resnet_dist.data.storage.retry import POLL_SECONDS
from resnet_dist.data.storage.stored_file import StoredFile, is_plain_local
from resnet_dist.data.storage.urls import IDX_SUFFIX, local_path, shown
from resnet_dist.errors import StorageError

NUM_FETCH_THREADS = 4  # per rank: enough to hide latency, few enough to keep memory small
MAX_OPEN_TRIES = 10
CLOSE_SECONDS = 1.0


class ShardCache:
    """Local files of shards: one ShardCache per process, one cache folder for all processes of a node.

    fresh: ignore what the cache holds and fetch every shard. An index must describe the shards as they are now.
    """

    def __init__(self, limits: CacheLimits, *, fresh: bool = False) -> None:
        self._limits = limits
        self._token = uuid.uuid4().hex if fresh else ""
        self._pool = ThreadPoolExecutor(NUM_FETCH_THREADS, thread_name_prefix="fetch")
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Path]] = {}
        self._closed = threading.Event()
        self._fetcher = Fetcher(limits, self._closed)

    def want(self, shards: Iterable[StoredFile]) -> None:
        """Begin to fetch, in this order, the shards that are not on this machine yet."""
        for shard in shards:
            if not (is_plain_local(shard) or mark_used(self._cached_path(shard))):
                self._begin(shard)

    def is_at_hand(self, shard: StoredFile) -> bool:
        return is_plain_local(shard) or self._cached_path(shard).exists()

    def path(self, shard: StoredFile) -> Path:
        """Return the path of the shard as a plain tar. Waits for a transfer; raises StorageError where it fails.

        Another process may evict the file at any time. To read it, use `open`: an open file stays readable.
        """
        if is_plain_local(shard):
            return local_path(shard.url)
        path = self._cached_path(shard)
        return path if mark_used(path) else self._wait_for(shard)

    def open(self, shard: StoredFile) -> tuple[int, Path]:
        """Return a file descriptor for reading, which the caller closes, and the path it was opened at.

        Raises StorageError where the shard cannot be fetched or read.
        """
        for _ in range(MAX_OPEN_TRIES):
            path = self.path(shard)
            try:
                return os.open(path, os.O_RDONLY), path
            except FileNotFoundError:
                if is_plain_local(shard):
                    raise StorageError(f"{path}: missing") from None
            except OSError as error:
                raise StorageError(f"{path}: {error.strerror}") from None
        raise StorageError(
            f"{shown(shard.url)}: evicted {MAX_OPEN_TRIES} times before it could be read; raise data.shard_cache_bytes="
            f"{self._limits.max_bytes:,}"
        )

    def forget(self, shard: StoredFile) -> None:
        """Remove a fetched shard from the cache."""
        if not is_plain_local(shard):
            # Remove the lock of a fresh cache only: other processes share the locks of the others.
            own_lock = (LOCK,) if self._token else ()
            for suffix in (TAR, IDX_SUFFIX, SUM, *own_lock):
                self._cached_path(shard).with_suffix(suffix).unlink(missing_ok=True)

    def fetched_checksum(self, shard: StoredFile) -> tuple[int, str] | None:
        """Return bytes and checksum of a remote compressed shard as it was fetched; None where it was not."""
        try:
            size, found = self._cached_path(shard).with_suffix(SUM).read_text().split()
        except FileNotFoundError:
            return None
        return int(size), found

    def close(self) -> None:
        """End the transfers. A thread that hashes or unpacks a large file is left to itself after CLOSE_SECONDS."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if not wait(list(self._under_way.values()), CLOSE_SECONDS).not_done:
            self._pool.shutdown(wait=True)

    def _cached_path(self, shard: StoredFile) -> Path:
        return cached_path(self._limits.folder, shard, self._token)

    def _begin(self, shard: StoredFile) -> Future[Path]:
        with self._lock:
            future = self._under_way.get(shard.url)
            if future is None:
                future = self._pool.submit(self._fetch, shard)
                self._under_way[shard.url] = future
                future.add_done_callback(lambda _: self._under_way.pop(shard.url, None))
            return future

    def _fetch(self, shard: StoredFile) -> Path:
        return self._fetcher.fetch(shard, self._cached_path(shard))

    def _wait_for(self, shard: StoredFile) -> Path:
        future = self._begin(shard)
        while not wait([future], POLL_SECONDS).done:
            if self._closed.is_set() and wait([future], CLOSE_SECONDS).not_done:
                raise StorageError(f"{shown(shard.url)}: given up, the loader was closed")
        if future.cancelled():
            raise StorageError(f"{shown(shard.url)}: given up, the loader was closed")
        return future.result()
