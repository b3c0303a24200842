"""URLs → local files: remote and compressed shards are fetched whole into a cache that a node's ranks share.

A file on this machine is used where it lies. What is fetched is resumed where a transfer broke, verified by
size and checksum before it gets its final name, and evicted least-recently-used beyond a limit of bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from resnet_dist.config import Data
from resnet_dist.data.storage.quota import Quota
from resnet_dist.data.storage.transfer import fetch_file, run_command
from resnet_dist.data.storage.unpack import compression_of_fetched, unpack
from resnet_dist.data.storage.urls import COMMAND, compression_of, is_local, local_path, size_of
from resnet_dist.errors import StorageError, UserError
from resnet_dist.system.files import checksum

FETCH_THREADS = 4  # shards under way at once in one rank: latency is hidden, memory stays small


@dataclass(frozen=True)
class StoredFile:
    """A file somewhere, and what is known of it."""

    url: str  # or a path on this machine
    num_bytes: int  # 0 where it is not known
    checksum: str  # ALGORITHM:HEX, or nothing

    @property
    def name(self) -> str:
        return posixpath.basename(self.url.rstrip("/"))


@dataclass(frozen=True)
class CacheLimits:
    """What a cache may take, and how long it tries."""

    folder: Path
    max_bytes: int
    timeout_seconds: float
    allow_commands: bool = False

    @classmethod
    def of(cls, data: Data) -> CacheLimits:
        folder = Path(data.shard_cache).expanduser()
        return cls(folder, data.shard_cache_bytes, data.fetch_timeout_seconds, data.allow_commands)


class ShardCache:
    """Local files of shards. One for each process; the cache folder is shared with the node's other ones.

    fresh: fetch anew what others left in the cache: whoever makes an index must see what is there now.
    """

    def __init__(self, limits: CacheLimits, *, fresh: bool = False) -> None:
        self._limits = limits
        self._room = Quota(limits.folder, limits.max_bytes)
        self._token = uuid.uuid4().hex if fresh else ""
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="fetch")
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Path]] = {}
        self._closed = threading.Event()

    def want(self, shards: Iterable[StoredFile]) -> None:
        """Begin to fetch, in this order, what is not here yet."""
        for shard in shards:
            if not (is_plain_local(shard) or _use(self._cached(shard))):
                self._begin(shard)

    def is_at_hand(self, shard: StoredFile) -> bool:
        return is_plain_local(shard) or self._cached(shard).exists()

    def path(self, shard: StoredFile) -> Path:
        """A local, uncompressed tar. Waits until it is there; raises StorageError where it cannot be had.

        Another process may evict it at any time: `open` it, and what is open stays.
        """
        if is_plain_local(shard):
            return local_path(shard.url)
        path = self._cached(shard)
        return path if _use(path) else self._begin(shard).result()

    def open(self, shard: StoredFile) -> tuple[int, Path]:
        """A file descriptor for reading, for the caller to close, and where the file was."""
        for _ in range(10):
            path = self.path(shard)
            try:
                return os.open(path, os.O_RDONLY), path
            except FileNotFoundError:
                if is_plain_local(shard):
                    raise StorageError(f"{path}: missing") from None
            except OSError as error:
                raise StorageError(f"{path}: {error.strerror}") from None
        raise StorageError(
            f"{shard.url}: evicted ten times before it could be read; raise data.shard_cache_bytes="
            f"{self._limits.max_bytes:,}"
        )

    def forget(self, shard: StoredFile) -> None:
        """Give the space of a fetched shard back."""
        if not is_plain_local(shard):
            own_lock = (".lock",) if self._token else ()  # another process may hold what is not ours alone
            for suffix in (".tar", ".idx", ".sum", *own_lock):
                self._cached(shard).with_suffix(suffix).unlink(missing_ok=True)

    def fetched_checksum(self, shard: StoredFile) -> tuple[int, str] | None:
        """Bytes and checksum of a remote compressed shard as it came over, which is not kept."""
        try:
            size, found = self._cached(shard).with_suffix(".sum").read_text().split()
        except FileNotFoundError:
            return None
        return int(size), found

    def close(self) -> None:
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _cached(self, shard: StoredFile) -> Path:
        # The whole URL names it: two sets may both have a 000000.tar. So does its content, as far as it is known.
        known = f"{shard.checksum} {shard.num_bytes} {self._token}"
        if is_local(shard.url):
            with contextlib.suppress(OSError):
                status = local_path(shard.url).stat()
                known += f" {status.st_size} {status.st_mtime_ns}"
        identity = hashlib.sha256(f"{shard.url} {known}".encode(errors="backslashreplace")).hexdigest()[:24]
        return self._limits.folder / identity[:2] / f"{identity}.tar"

    def _begin(self, shard: StoredFile) -> Future[Path]:
        with self._lock:
            future = self._under_way.get(shard.url)
            if future is None:
                future = self._pool.submit(self._fetch, shard)
                self._under_way[shard.url] = future
                future.add_done_callback(lambda _: self._under_way.pop(shard.url, None))
            return future

    def _fetch(self, shard: StoredFile) -> Path:
        path = self._cached(shard)
        check_command(shard.url, allowed=self._limits.allow_commands)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._only_process(path, shard):
            if path.exists():  # another process has fetched it meanwhile
                return path
            if is_local(shard.url):
                problem = difference(local_path(shard.url), shard)
                if problem:
                    raise StorageError(f"{shard.url}: {problem}; index the shards again if they were changed")
                self._decompress(shard, local_path(shard.url), path)
                return path
            with self._room.reserved(
                path,
                shard.num_bytes,
                url=shard.url,
                timeout_seconds=self._limits.timeout_seconds,
                closed=self._closed,
            ):
                self._fetch_remote(shard, path)
        return path

    def _fetch_remote(self, shard: StoredFile, path: Path) -> None:
        raw = path.with_suffix(".raw")
        self._download(shard, raw)
        if compression_of_fetched(raw, shard.url):
            path.with_suffix(".sum").write_text(f"{raw.stat().st_size} {checksum(raw)}")
            self._decompress(shard, raw, path)
            return
        raw.replace(path)
        if not shard.num_bytes:  # known only now
            self._room.evict(keep=path)

    @contextlib.contextmanager
    def _only_process(self, path: Path, shard: StoredFile) -> Iterator[None]:
        """Hold the shard's lock. Whoever has it is waited for as long as his file grows."""
        lock = FileLock(path.with_suffix(".lock"))  # the kernel frees it when its holder dies
        seen, since = -1, time.monotonic()
        while True:
            try:
                with lock.acquire(timeout=1):
                    yield
                return
            except Timeout:
                size = sum(size_of(file) for file in path.parent.glob(f"{path.stem}.*partial"))
                if size != seen:
                    seen, since = size, time.monotonic()
                if self._closed.is_set():
                    raise StorageError(f"{shard.url}: given up, the loader was closed") from None
                if time.monotonic() - since > self._limits.timeout_seconds:
                    raise StorageError(
                        f"{shard.url}: another process holds {lock.lock_file} and has made no progress for "
                        f"{self._limits.timeout_seconds:.0f} s"
                    ) from None

    def _download(self, shard: StoredFile, target: Path) -> None:
        """Fetch, verify, and only then give the file its name."""
        partial = target.with_suffix(target.suffix + ".partial")
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
                partial.replace(target)
                return
            partial.unlink()  # begun before the remote file changed, or damaged on the way: once more, whole
            if last:
                raise StorageError(f"{shard.url}: {problem}; index the shards again if they were changed")

    def _decompress(self, shard: StoredFile, raw: Path, path: Path) -> None:
        partial = path.with_suffix(".tar.partial")
        try:
            unpack(raw, partial, shard.url, self._limits.max_bytes)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            if raw.suffix == ".raw":
                raw.unlink()
        self._room.evict(keep=path)
        partial.replace(path)


def _use(path: Path) -> bool:
    """Whether the file is there, used now: evicted last."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)
        return True
    return False


def is_plain_local(shard: StoredFile) -> bool:
    """Whether the shard can be read where it is, by offset."""
    return is_local(shard.url) and compression_of(shard.url) is None


def check_command(url: str, *, allowed: bool) -> None:
    """Raise UserError for a shard that would run a shell, unless a person allowed it."""
    if url.startswith(COMMAND) and not allowed:
        raise UserError(
            f"{url!r} would run a command in a shell; pass --allow-commands (or set data.allow_commands=true) if "
            "you trust where it comes from"
        )


def difference(path: Path, shard: StoredFile) -> str | None:
    """What is wrong with a file, compared with the index; None where nothing is."""
    size = path.stat().st_size
    if shard.num_bytes and size != shard.num_bytes:
        return f"has {size:,} bytes, but the index says {shard.num_bytes:,}"
    algorithm, _, expected = shard.checksum.partition(":")
    if expected:
        found = checksum(path, algorithm)
        if found != shard.checksum:
            return f"has {found}, but the index says {shard.checksum}"
    return None
