"""Lock a file between processes, on file systems without flock too; own a folder that outlives no process."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where filelock has a lock of its own
    fcntl = None  # type: ignore[assignment]

# The answers of a file system that has no locks: some NFS, FUSE and cluster file systems.
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP})
# The lock on such a file system: a file that exists while the lock is held. It names the host and process that hold it.
MARKER_SUFFIX = ".held"
LOCK_SUFFIX = ".lock"  # of the file beside a folder, which the user of the folder locks


class LockHeld(Exception):
    """Another process holds the lock. `marker` is its file on a file system without locks, else None."""

    def __init__(self, marker: Path | None) -> None:
        super().__init__(f"another process holds the lock {marker or ''}".rstrip())
        self.marker = marker


@contextmanager
def hold_lock(path: Path, timeout_seconds: float) -> Iterator[None]:
    """Hold the lock of the file `path`, which is created. Raises LockHeld where another process keeps it that long.

    The kernel releases the lock of a process that dies. On a file system without flock, a marker file is the lock; one
    that a dead process of this host has left behind is taken over.
    """
    # Here, because `--help` needs none.
    from filelock import FileLock, SoftFileLock, Timeout

    if has_flock(path):
        lock, marker = FileLock(path), None
    else:
        marker = path.with_name(path.name + MARKER_SUFFIX)
        lock = SoftFileLock(marker)
    try:
        lock.acquire(timeout=timeout_seconds)
    except Timeout:
        raise LockHeld(marker) from None
    try:
        yield
    finally:
        lock.release()


def has_flock(path: Path) -> bool:
    """Report whether the file system of the file `path`, which is created, has the locks of flock."""
    if fcntl is None:
        return True
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return True


def lock_of(folder: Path) -> Path:
    """Return the path of the lock of a folder, which its user holds."""
    return folder.with_name(f"{folder.name}{LOCK_SUFFIX}")


@contextmanager
def own_folder(folder: Path) -> Iterator[Path]:
    """Hold the lock of a folder, which the block makes; remove it at the end, and first those of processes that died.

    All folders beside it must be owned in this way.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in locked_folders(folder.parent.iterdir()):
        remove_unlocked(other)
    try:
        with FileLock(lock_of(folder)):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock_of(folder).unlink(missing_ok=True)


def locked_folders(paths: Iterable[Path]) -> set[Path]:
    """Return the folders among these paths, and those that the locks among them belong to."""
    return {path.with_name(path.name.removesuffix(LOCK_SUFFIX)) for path in paths}


def remove_unlocked(folder: Path) -> None:
    """Remove a folder and its lock, unless a process holds that."""
    from filelock import FileLock, Timeout

    with suppress(Timeout, OSError), FileLock(lock_of(folder), timeout=0):
        shutil.rmtree(folder, ignore_errors=True)
        # A process that waits for it sees that it is gone, and makes another one.
        lock_of(folder).unlink(missing_ok=True)
