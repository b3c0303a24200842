"""A folder on a disk or a network file system, which all nodes of a run share."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from resnet_dist.errors import StorageError
from resnet_dist.runs.storage.folder_bundles import FolderBundles
from resnet_dist.runs.storage.folder_check import check_folder
from resnet_dist.runs.storage.logs import FileLog
from resnet_dist.runs.storage.protocol import StoredObject, Versioned
from resnet_dist.system.files import write_bytes_atomically
from resnet_dist.system.locks import has_flock, hold_lock

POLL_SECONDS = 0.2
# A process that replaces a file holds its guard for less than this, unless it died.
GUARD_SECONDS = 10.0
GUARD_POLL_SECONDS = 0.02


class Folder:
    """The Storage of a folder, which need not exist. See protocol.Storage."""

    poll_seconds = POLL_SECONDS

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()

    @property
    def location(self) -> str:
        return str(self._path)

    def check(self, *folders: str) -> None:
        check_folder(self._path, folders)

    def is_gone(self) -> bool:
        with _explained(self._path):
            return not self._path.exists()

    def local_folder(self) -> Path:
        return self._path

    def at(self, name: str) -> Folder:
        return Folder(self._path / name)

    def read(self, name: str) -> bytes | None:
        with _explained(self._path / name):
            try:
                return (self._path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def read_version(self, name: str) -> Versioned | None:
        content = self.read(name)
        return None if content is None else Versioned(content, _version(content))

    def write(self, name: str, content: bytes) -> None:
        path = self._path / name
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomically(path, content)

    def create(self, name: str, content: bytes) -> bool:
        path = self._path / name
        # Write aside and link: a reader never sees a part of the content.
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        with _explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_bytes(content)
                os.link(partial, path)
            except FileExistsError:
                return self.read(name) == content
            finally:
                partial.unlink(missing_ok=True)
        return True

    def replace(self, name: str, content: bytes, version: str) -> str | None:
        if not (self._path / name).exists():
            return None
        with self._guarded(self._path / name):
            current = self.read_version(name)
            if current is None or current.version != version:
                return None
            self.write(name, content)
            return _version(content)

    def modified(self, name: str) -> float | None:
        with _explained(self._path / name):
            try:
                return (self._path / name).stat().st_mtime
            except FileNotFoundError:
                return None

    def objects(self, prefix: str = "") -> list[StoredObject]:
        found = []
        for path in sorted((self._path / prefix).rglob("*")):
            with suppress(FileNotFoundError):  # Another process has just removed it.
                if path.is_file() and not path.name.startswith("."):
                    status = path.stat()
                    name = path.relative_to(self._path).as_posix()
                    found.append(StoredObject(name, status.st_size, status.st_mtime))
        return found

    def folders(self) -> list[str]:
        with suppress(FileNotFoundError), _explained(self._path):
            return sorted(
                path.name for path in self._path.iterdir() if path.is_dir() and not path.name.startswith(".")
            )
        return []

    def delete(self, *names: str) -> None:
        for name in names:
            with _explained(self._path / name):
                (self._path / name).unlink(missing_ok=True)

    def delete_all(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)
        with suppress(OSError):  # The folder above holds something else.
            self._path.parent.rmdir()

    @contextmanager
    def lock(self, name: str) -> Iterator[bool]:
        path = self._path / name
        with ExitStack() as stack:
            with _explained(path):
                self._path.mkdir(parents=True, exist_ok=True)
                # The other kind of lock, a file that exists, would outlive a process that died on another host.
                if is_locked := has_flock(path):
                    stack.enter_context(hold_lock(path, 0))
            yield is_locked

    def log(self, name: str) -> FileLog:
        return FileLog(self._path / name)

    def bundles(self, commit: str) -> FolderBundles:
        return FolderBundles(self._path)

    @contextmanager
    def _guarded(self, path: Path) -> Iterator[None]:
        """Keep other processes from replacing the file; network file systems have no other way for that."""
        guard = path.with_name(f".{path.name}.replacing")
        pause, seen, since = threading.Event(), "", time.monotonic()
        while True:
            try:
                os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
                break
            except FileExistsError:
                with suppress(FileNotFoundError):
                    status = guard.stat()
                    now = f"{status.st_ino} {status.st_mtime_ns}"
                    if now != seen:
                        seen, since = now, time.monotonic()
                    elif time.monotonic() - since > GUARD_SECONDS:
                        guard.unlink(missing_ok=True)  # Its process has died.
                pause.wait(GUARD_POLL_SECONDS)
            except OSError as error:
                raise StorageError(f"{path}: {error.strerror}") from error
        try:
            yield
        finally:
            guard.unlink(missing_ok=True)


def _version(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise OSErrors as StorageErrors, which name the path and keep the number of the error."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error
