"""URLs → local files: remote and compressed shards are fetched whole into a cache that a node's ranks share.

A plain tar on this machine is used where it lies. A broken transfer is resumed; a fetched file gets its final name
only after its size and checksum are verified; beyond a limit of bytes the least recently used shards are evicted.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from resnet_dist.config import Data
from resnet_dist.data.storage.cache_files import LOCK, RAW, RAW_PARTIAL, SUM, TAR, TAR_PARTIAL
from resnet_dist.data.storage.command import run_command
from resnet_dist.data.storage.disk_room import DiskRoom
from resnet_dist.data.storage.quota import Quota
from resnet_dist.data.storage.retry import POLL_SECONDS, Patience
from resnet_dist.data.storage.transfer import fetch_file, size_of
from resnet_dist.data.storage.unpack import compression_of_file, unpack
from resnet_dist.data.storage.urls import (
    COMMAND,
    IDX_SUFFIX,
    file_name,
    is_local,
    local_path,
    shown,
    unsigned,
)
from resnet_dist.errors import StorageError, UserError
from resnet_dist.system.files import checksum, expanded

NUM_FETCH_THREADS = 4  # per rank: enough to hide latency, few enough to keep memory small
MAX_OPEN_TRIES = 10
CLOSE_SECONDS = 1.0


@dataclass(frozen=True)
class StoredFile:
    """A file by its URL, with its size and checksum where an index records them."""

    url: str  # or a path on this machine
    num_bytes: int  # 0: unknown
    checksum: str  # ALGORITHM:HEX; empty: unknown

    @property
    def name(self) -> str:
        return file_name(self.url)


@dataclass(frozen=True)
class CacheLimits:
    """The limits of a shard cache: its folder, its bytes, its patience, and what it may run."""

    folder: Path
    max_bytes: int
    timeout_seconds: float  # without a byte of progress
    allow_commands: bool = False  # run `pipe:COMMAND` shards in a shell

    @classmethod
    def of(cls, data: Data) -> CacheLimits:
        folder = expanded(data.shard_cache)
        return cls(folder, data.shard_cache_bytes, data.fetch_timeout_seconds, data.allow_commands)


class ShardCache:
    """Local files of shards: one ShardCache per process, one cache folder for all processes of a node.

    fresh: ignore what the cache holds and fetch every shard. An index must describe the shards as they are now.
    """

    def __init__(self, limits: CacheLimits, *, fresh: bool = False) -> None:
        self._limits = limits
        self._quota = Quota(limits.folder, limits.max_bytes)
        self._token = uuid.uuid4().hex if fresh else ""
        self._pool = ThreadPoolExecutor(NUM_FETCH_THREADS, thread_name_prefix="fetch")
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Path]] = {}
        self._closed = threading.Event()
        self._room = DiskRoom(self._quota, limits.timeout_seconds, self._closed)

    def want(self, shards: Iterable[StoredFile]) -> None:
        """Begin to fetch, in this order, the shards that are not on this machine yet."""
        for shard in shards:
            if not (is_plain_local(shard) or _mark_used(self._cached_path(shard))):
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
        return path if _mark_used(path) else self._wait_for(shard)

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
        # Name the file after the whole URL, because two sets may both have a 000000.tar, and after what is known of
        # its content, so that a changed shard gets a new file. A URL that is signed anew names the same file.
        known = f"{shard.checksum} {shard.num_bytes} {self._token}"
        if is_local(shard.url):
            with contextlib.suppress(OSError):
                status = local_path(shard.url).stat()
                known += f" {status.st_size} {status.st_mtime_ns}"
        identity = hashlib.sha256(
            f"{unsigned(shard.url)} {known}".encode(errors="backslashreplace")
        ).hexdigest()[:24]
        return self._limits.folder / identity[:2] / f"{identity}{TAR}"

    def _begin(self, shard: StoredFile) -> Future[Path]:
        with self._lock:
            future = self._under_way.get(shard.url)
            if future is None:
                future = self._pool.submit(self._fetch, shard)
                self._under_way[shard.url] = future
                future.add_done_callback(lambda _: self._under_way.pop(shard.url, None))
            return future

    def _wait_for(self, shard: StoredFile) -> Path:
        future = self._begin(shard)
        while not wait([future], POLL_SECONDS).done:
            if self._closed.is_set() and wait([future], CLOSE_SECONDS).not_done:
                raise StorageError(f"{shown(shard.url)}: given up, the loader was closed")
        if future.cancelled():
            raise StorageError(f"{shown(shard.url)}: given up, the loader was closed")
        return future.result()

    def _fetch(self, shard: StoredFile) -> Path:
        path = self._cached_path(shard)
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


def _mark_used(path: Path) -> bool:
    """Set the time of last use, by which shards are evicted. Returns False where the file does not exist."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def is_plain_local(shard: StoredFile) -> bool:
    """Report whether the shard is an uncompressed file on this machine, which is read where it lies."""
    return is_local(shard.url) and compression_of_file(local_path(shard.url)) is None


def check_command(url: str, *, allowed: bool) -> None:
    """Raise UserError for a URL that would run a command in a shell, unless commands are allowed."""
    if url.startswith(COMMAND) and not allowed:
        raise UserError(
            f"{shown(url)!r} would run a command in a shell; pass --allow-commands (or set data.allow_commands=true) if "
            "you trust where it comes from"
        )


def difference(path: Path, shard: StoredFile) -> str | None:
    """Compare a file's size and checksum with the index. Returns the difference in words; None where they agree."""
    size = path.stat().st_size
    if shard.num_bytes and size != shard.num_bytes:
        return f"has {size:,} bytes, but the index records {shard.num_bytes:,}"
    algorithm, _, expected = shard.checksum.partition(":")
    if expected:
        found = checksum(path, algorithm)
        if found != shard.checksum:
            return f"has {found}, but the index records {shard.checksum}"
    return None
