"""The byte limit of a node's shard cache: files that lie there and files on their way count together.

Processes and threads share the limit through files alone. The process that fetches a shard holds its lock, and a
`.coming` file records the shard's size. A `.coming` file whose lock is free was left by a process that died.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from resnet_dist.data.storage.cache.folder import COMING, LOCK, RAW, RAW_PARTIAL, SUM, TAR, TAR_PARTIAL
from resnet_dist.data.storage.retry import Patience
from resnet_dist.data.storage.transfer import POLL_SECONDS, size_of
from resnet_dist.data.storage.urls import IDX_SUFFIX, shown
from resnet_dist.errors import StorageError


@dataclass(frozen=True)
class Quota:
    """At most `max_bytes` of shards in `folder`. A file that another process is writing is never evicted."""

    folder: Path
    max_bytes: int

    @contextlib.contextmanager
    def reserved(
        self, path: Path, num_bytes: int, *, url: str, timeout_seconds: float, closed: threading.Event
    ) -> Iterator[None]:
        """Reserve `num_bytes` for the file that will be written to `path`, whose lock the caller holds.

        Evicts other shards; where that is not enough, waits for files on their way. Raises StorageError for a file
        larger than the limit, when `closed` is set, and after `timeout_seconds` in which no byte arrived.
        """
        if num_bytes > self.max_bytes:
            raise StorageError(
                f"{shown(url)}: its {num_bytes:,} bytes are larger than data.shard_cache_bytes={self.max_bytes:,}"
            )
        seen, patience = -1, Patience(url, timeout_seconds, closed)
        while not self._reserve(path, num_bytes):
            arrived = sum(size for _, size, _ in self._files())
            if arrived != seen:
                seen = arrived
                patience.progressed()
            patience.pause(POLL_SECONDS, f"room in {self.folder}")
            if patience.is_over():
                raise StorageError(
                    f"{shown(url)}: data.shard_cache_bytes={self.max_bytes:,} are taken by other shards on their way, of which "
                    f"nothing came for {timeout_seconds:.0f} s"
                )
        try:
            yield
        finally:
            _coming_file(path).unlink(missing_ok=True)

    def evict(self, keep: Path) -> None:
        """Evict shards until the cache is within its limit again; `keep` is complete and stays."""
        with self._lock():
            self._drop(self._excess(sum(self._missing_bytes(keep).values())), keep)

    def make_room(self, num_bytes: int, keep: Path) -> bool:
        """Evict shards of `num_bytes`, because the disk holds less than the limit; report whether there were any."""
        with self._lock():
            found = self._evictable(keep)
            # A shard of unknown size gets the room of another one.
            self._drop(max(num_bytes, 1), keep)
        return bool(found)

    def _reserve(self, path: Path, num_bytes: int) -> bool:
        """Reserve the bytes and return True; return False where the caller must wait for files on their way."""
        with self._lock():
            missing_bytes = self._missing_bytes(path)
            excess = self._excess(num_bytes - _written_bytes(path) + sum(missing_bytes.values()))
            # Evict nothing where evicting everything would not make enough room.
            if missing_bytes and excess > sum(size for _, size, _ in self._evictable(path)):
                return False
            self._drop(excess, path)
            _coming_file(path).write_text(str(num_bytes))
            return True

    def _excess(self, additional_bytes: int) -> int:
        return sum(size for _, size, _ in self._files()) + additional_bytes - self.max_bytes

    def _evictable(self, keep: Path) -> list[tuple[float, int, Path]]:
        """Return shards other than `keep`, and partial files that no process writes, least recently used first."""
        return sorted(
            (used, size, file)
            for used, size, file in self._files()
            if file != keep and (file.suffix == TAR or not _is_being_written(file))
        )

    def _drop(self, excess: int, keep: Path) -> None:
        for _, size, file in self._evictable(keep) if excess > 0 else ():
            if excess <= 0:
                return
            if _remove(file):
                excess -= size

    def _missing_bytes(self, own: Path) -> dict[Path, int]:
        """Return the bytes that each file on its way, except `own`, still lacks. Removes what dead processes left."""
        missing = {}
        for coming in self.folder.glob(f"??/*{COMING}"):
            if coming == _coming_file(own):
                continue
            with _locked_if_free(coming) as is_free:
                if is_free:
                    coming.unlink(missing_ok=True)
                    continue
            with contextlib.suppress(FileNotFoundError, ValueError):
                missing[coming] = max(0, int(coming.read_text()) - _written_bytes(coming))
        return missing

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return last use, size and path of every shard, complete or partial.

        Other processes rename files meanwhile, each to the next kind in this loop: in this order none is missed, and
        a file seen under both names is counted once, by its inode.
        """
        files = {}
        for kind in (RAW_PARTIAL, RAW, TAR_PARTIAL, TAR):
            for file in self.folder.glob(f"??/*{kind}"):
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    files[status.st_dev, status.st_ino] = (status.st_mtime, status.st_size, file)
        return list(files.values())

    def _lock(self) -> FileLock:
        return FileLock(self.folder / ".evicting.lock")


def _is_being_written(file: Path) -> bool:
    with _locked_if_free(file) as is_free:
        return not is_free


def _remove(file: Path) -> bool:
    """Remove a shard, or a partial file unless a process writes it; report whether it was removed."""
    if file.suffix == TAR:
        file.unlink(missing_ok=True)
        for suffix in (IDX_SUFFIX, SUM):
            file.with_suffix(suffix).unlink(missing_ok=True)
        return True
    with _locked_if_free(file) as is_free:
        if is_free:
            file.unlink(missing_ok=True)
        return is_free


@contextlib.contextmanager
def _locked_if_free(file: Path) -> Iterator[bool]:
    """Report whether no process fetches the shard of `file`; then hold its lock, so that none can begin."""
    lock = FileLock(file.with_name(_identity(file) + LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _written_bytes(path: Path) -> int:
    """Return the bytes fetched so far of the shard that `path` belongs to."""
    return max(size_of(path.with_name(_identity(path) + kind)) for kind in (RAW, RAW_PARTIAL))


def _coming_file(path: Path) -> Path:
    return path.with_suffix(COMING)


def _identity(file: Path) -> str:
    return file.name.partition(".")[0]
