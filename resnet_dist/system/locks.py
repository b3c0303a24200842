"""Lock a file between processes, on file systems without flock too; own a folder that outlives no process."""

from __future__ import annotations

import errno
import logging
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
MAX_NAMES = 3  # folders that a message names

log = logging.getLogger(__name__)
_reported: set[Path] = set()  # folders whose other content this process has reported


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

    A folder without a lock is kept, and reported once: it may be in use by an earlier version, which locked none, or be
    a person's.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    paths = [*folder.parent.iterdir()]
    for other in locked_folders(paths):
        remove_unlocked(other)
    _report_unknown(folder.parent, paths)
    try:
        with FileLock(lock_of(folder)):
            yield folder
    finally:
        _remove(folder)


def locked_folders(paths: Iterable[Path]) -> set[Path]:
    """Return the folders, which need not exist, that the locks among these paths belong to."""
    return {
        path.with_name(path.name.removesuffix(LOCK_SUFFIX)) for path in paths if path.suffix == LOCK_SUFFIX
    }


def remove_unlocked(folder: Path) -> None:
    """Remove a folder and its lock, unless a process holds that."""
    from filelock import FileLock, Timeout

    with suppress(Timeout, OSError), FileLock(lock_of(folder), timeout=0):
        # A process that waits for the lock sees that it is gone, and makes another one.
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, and its lock once nothing of it is left: without a lock it would be kept for good."""
    shutil.rmtree(folder, ignore_errors=True)
    if not folder.exists():
        lock_of(folder).unlink(missing_ok=True)


def _report_unknown(parent: Path, paths: Iterable[Path]) -> None:
    # The lock is made before its folder, and removed after it: ask for it first, as a process may do either just now.
    unknown = sorted(path.name for path in paths if not lock_of(path).exists() and path.is_dir())
    if unknown and parent not in _reported:
        _reported.add(parent)
        more = ", …" if len(unknown) > MAX_NAMES else ""
        log.warning(
            "%s: keeps %d folder(s) without a lock, which an earlier version may use: %s%s; delete them if no training runs",
            parent,
            len(unknown),
            ", ".join(unknown[:MAX_NAMES]),
            more,
        )
