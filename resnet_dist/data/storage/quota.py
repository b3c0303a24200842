"""The bytes that a node's shard cache may take: what lies there, and what is on its way.

Processes and threads share the limit through files alone. Whoever fetches a shard holds its `.lock`, and its
`.coming` says how large it will be: such a file without a locked neighbour was left by someone who died.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from resnet_dist.data.storage.transfer import POLL_SECONDS
from resnet_dist.data.storage.urls import size_of
from resnet_dist.errors import StorageError


@dataclass(frozen=True)
class Quota:
    """At most `max_bytes` in `folder`; a file that is never evicted is one that somebody is writing."""

    folder: Path
    max_bytes: int

    @contextlib.contextmanager
    def reserved(
        self, path: Path, num_bytes: int, *, url: str, timeout_seconds: float, closed: threading.Event
    ) -> Iterator[None]:
        """Keep room for a file of `num_bytes` that will come to `path`, whose lock the caller holds.

        Where evicting is not enough, other files on their way are waited for. Raises StorageError for a file that
        is larger than all there is, when `closed` is set, and after `timeout_seconds` in which nothing came.
        """
        if num_bytes > self.max_bytes:
            raise StorageError(
                f"{url}: its {num_bytes:,} bytes are larger than data.shard_cache_bytes={self.max_bytes:,}"
            )
        seen, since = -1, time.monotonic()
        while not self._reserve(path, num_bytes):
            arrived = sum(size for _, size, _ in self._files())
            if arrived != seen:
                seen, since = arrived, time.monotonic()
            if closed.wait(POLL_SECONDS):
                raise StorageError(f"{url}: given up, the loader was closed")
            if time.monotonic() - since > timeout_seconds:
                raise StorageError(
                    f"{url}: data.shard_cache_bytes={self.max_bytes:,} are taken by other shards on their way, of which "
                    f"nothing came for {timeout_seconds:.0f} s"
                )
        try:
            yield
        finally:
            _mark(path).unlink(missing_ok=True)

    def evict(self, keep: Path) -> None:
        """Bring what is there, and on its way, back within the limit; `keep` stays, and has all its bytes."""
        with self._alone():
            self._drop(self._excess(sum(self._coming(keep).values())), keep)

    def _reserve(self, path: Path, num_bytes: int) -> bool:
        """Whether there is room now, or nothing that could make more of it."""
        with self._alone():
            coming = self._coming(path)
            excess = self._excess(num_bytes - _written(path) + sum(coming.values()))
            if coming and excess > sum(size for _, size, _ in self._evictable(path)):
                return False  # and nothing is dropped in vain
            self._drop(excess, path)
            _mark(path).write_text(str(num_bytes))
            return True

    def _excess(self, wanted: int) -> int:
        return sum(size for _, size, _ in self._files()) + wanted - self.max_bytes

    def _evictable(self, keep: Path) -> list[tuple[float, int, Path]]:
        """Shards beside `keep`, and what is left of those that nobody fetches any more: what was used longest ago first."""
        return sorted(
            (used, size, file)
            for used, size, file in self._files()
            if file != keep and (file.suffix == ".tar" or not _is_written(file))
        )

    def _drop(self, excess: int, keep: Path) -> None:
        for _, size, file in self._evictable(keep) if excess > 0 else ():
            if excess <= 0:
                return
            if _remove(file):
                excess -= size

    def _coming(self, own: Path) -> dict[Path, int]:
        """Bytes that files on their way beside `own` still lack; forgets those that nobody fetches any more."""
        coming = {}
        for mark in self.folder.glob("??/*.coming"):
            if mark == _mark(own):
                continue
            with _if_nobody_writes(mark) as nobody:
                if nobody:
                    mark.unlink(missing_ok=True)
                    continue
            with contextlib.suppress(FileNotFoundError, ValueError):
                coming[mark] = max(0, int(mark.read_text()) - _written(mark))
        return coming

    def _files(self) -> list[tuple[float, int, Path]]:
        """Last use, size and path of every shard, whole or in part.

        Others rename them meanwhile, to the kind that comes next: in this order none is missed. One that is met again
        under its next name is still the same file.
        """
        files = {}
        for kind in ("*.raw.partial", "*.raw", "*.tar.partial", "*.tar"):
            for file in self.folder.glob(f"??/{kind}"):
                with contextlib.suppress(FileNotFoundError):
                    status = file.stat()
                    files[status.st_dev, status.st_ino] = (status.st_mtime, status.st_size, file)
        return list(files.values())

    def _alone(self) -> FileLock:
        return FileLock(self.folder / ".evicting.lock")


def _is_written(file: Path) -> bool:
    with _if_nobody_writes(file) as nobody:
        return not nobody


def _remove(file: Path) -> bool:
    """Remove a shard, or what is left of one that nobody fetches any more."""
    if file.suffix == ".tar":
        file.unlink(missing_ok=True)
        for suffix in (".idx", ".sum"):
            file.with_suffix(suffix).unlink(missing_ok=True)
        return True
    with _if_nobody_writes(file) as nobody:
        if nobody:
            file.unlink(missing_ok=True)
        return nobody


@contextlib.contextmanager
def _if_nobody_writes(file: Path) -> Iterator[bool]:
    """Whether nobody fetches the shard that `file` belongs to; nobody can begin to meanwhile."""
    lock = FileLock(file.with_name(f"{_identity(file)}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _written(path: Path) -> int:
    """Bytes that have come of the shard that `path` belongs to."""
    return max(size_of(path.with_name(_identity(path) + kind)) for kind in (".raw", ".raw.partial"))


def _mark(path: Path) -> Path:
    return path.with_suffix(".coming")


def _identity(file: Path) -> str:
    return file.name.partition(".")[0]
