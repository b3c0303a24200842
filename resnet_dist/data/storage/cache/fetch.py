"""One shard → its file in the cache: fetched or unpacked aside, verified, and only then renamed.

A broken transfer is resumed. Processes that want the same shard wait for the one that holds its lock.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from resnet_dist.data.storage.cache.disk_room import DiskRoom
from resnet_dist.data.storage.cache.folder import LOCK, RAW, RAW_PARTIAL, SUM, TAR_PARTIAL, CacheLimits
from resnet_dist.data.storage.cache.quota import Quota
from resnet_dist.data.storage.command import run_command
from resnet_dist.data.storage.retry import POLL_SECONDS, Patience
from resnet_dist.data.storage.stored_file import StoredFile, check_command, difference
from resnet_dist.data.storage.transfer import fetch_file, size_of
from resnet_dist.data.storage.unpack import compression_of_file, unpack
from resnet_dist.data.storage.urls import COMMAND, is_local, local_path, shown
from resnet_dist.errors import StorageError
from resnet_dist.system.files import checksum


class Fetcher:
    """Fetches shards into a cache. closed: set once nobody needs them any more."""

    def __init__(self, limits: CacheLimits, closed: threading.Event) -> None:
        self._limits, self._closed = limits, closed
        self._quota = Quota(limits.folder, limits.max_bytes)
        self._room = DiskRoom(self._quota, limits.timeout_seconds, closed)

    def fetch(self, shard: StoredFile, path: Path) -> Path:
        """Write the shard to `path`, as a plain tar, unless another process has; return the path. Raises StorageError."""
        check_command(shard.url, allowed=self._limits.allow_commands)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"data.shard_cache={self._limits.folder}: cannot be written: {error.strerror}"
            ) from None
        with self._locked(path, shard):
            if path.exists():  # fetched by another process while this one waited for the lock
                return path
            if is_local(shard.url):
                problem = difference(local_path(shard.url), shard)
                if problem:
                    raise StorageError(
                        f"{shown(shard.url)}: {problem}; index the shards again if they were changed"
                    )
                self._write(shard, path, lambda: self._decompress(shard, local_path(shard.url), path))
                return path
            with self._quota.reserved(
                path,
                shard.num_bytes,
                url=shard.url,
                timeout_seconds=self._limits.timeout_seconds,
                closed=self._closed,
            ):
                self._write(shard, path, lambda: self._fetch_remote(shard, path))
        return path

    def _write(self, shard: StoredFile, path: Path, write: Callable[[], None]) -> None:
        self._room.used_by(write, path=path, url=shard.url, num_bytes=shard.num_bytes)

    def _fetch_remote(self, shard: StoredFile, path: Path) -> None:
        raw = path.with_suffix(RAW)
        self._download(shard, raw)
        if compression_of_file(raw):
            path.with_suffix(SUM).write_text(f"{raw.stat().st_size} {checksum(raw)}")
            self._decompress(shard, raw, path)
            return
        raw.replace(path)
        # A shard of unknown size reserved nothing: make room for it now that its size is known.
        if not shard.num_bytes:
            self._quota.evict(keep=path)

    @contextlib.contextmanager
    def _locked(self, path: Path, shard: StoredFile) -> Iterator[None]:
        """Hold the shard's lock. Waits for another process that holds it, as long as that process's file grows."""
        lock = FileLock(path.with_suffix(LOCK))  # the kernel releases it when its holder dies
        seen, patience = -1, Patience(shard.url, self._limits.timeout_seconds, self._closed)
        while True:
            try:
                with lock.acquire(timeout=POLL_SECONDS, poll_interval=POLL_SECONDS / 2):
                    yield
                return
            except Timeout:
                size = sum(size_of(file) for file in path.parent.glob(f"{path.stem}.*partial"))
                if size != seen:
                    seen = size
                    patience.progressed()
                patience.check("another process, which fetches it")
                if patience.is_over():
                    raise StorageError(
                        f"{shown(shard.url)}: another process holds {lock.lock_file} and has made no progress for "
                        f"{self._limits.timeout_seconds:.0f} s"
                    ) from None

    def _download(self, shard: StoredFile, raw: Path) -> None:
        """Fetch into a partial file, verify it, and only then rename it to `raw`."""
        partial = raw.with_suffix(RAW_PARTIAL)
        for last in (False, True):
            if shard.url.startswith(COMMAND):
                run_command(shard.url, partial, self._limits.timeout_seconds, self._closed)
            else:
                fetch_file(
                    shard.url,
                    partial,
                    num_bytes=shard.num_bytes,
                    timeout_seconds=self._limits.timeout_seconds,
                    closed=self._closed,
                )
            problem = difference(partial, shard)
            if problem is None:
                with partial.open("rb") as file:
                    os.fsync(file.fileno())
                partial.replace(raw)
                return
            # Fetch once more from the start: the file was damaged on the way, or begun before the remote one changed.
            partial.unlink()
            if last:
                raise StorageError(
                    f"{shown(shard.url)}: {problem}; index the shards again if they were changed"
                )

    def _decompress(self, shard: StoredFile, raw: Path, path: Path) -> None:
        partial = path.with_suffix(TAR_PARTIAL)
        try:
            unpack(raw, partial, shown(shard.url), self._limits.max_bytes)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            if raw.suffix == RAW:  # not a person's own file
                raw.unlink()
        self._quota.evict(keep=path)
        partial.replace(path)
