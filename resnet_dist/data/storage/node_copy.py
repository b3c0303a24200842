"""One copy of a small remote file for all processes of a node, such as an index: the first of them fetches it."""

from __future__ import annotations

import contextlib
import hashlib
import time
from pathlib import Path

from resnet_dist.data.storage.transfer import read_bytes
from resnet_dist.data.storage.urls import is_local, unsigned
from resnet_dist.system.files import write_bytes_atomically
from resnet_dist.system.locks import LOCK_SUFFIX, LockHeld, hold_lock

FOLDER = "indexes"  # in the shard cache
UNUSED_SECONDS = 30 * 86_400.0  # after which a copy that nobody reads any more is removed
WAIT_SECONDS = 120.0  # for another process that fetches a file, before this one fetches it too
ONLY_OWNER = 0o600  # An index may hold the signed URLs of its shards.


class NodeCopies:
    """Copies in a folder of this node of files whose content has the name `version`: another content, another copy."""

    def __init__(self, cache: Path, version: str) -> None:
        self._folder, self._version = cache / FOLDER, version
        self._paths: set[Path] = set()  # of the files that were asked for

    def read(self, url: str) -> bytes:
        """Return the content of a file. It is fetched where the folder cannot be used, too.

        Raises FileNotFoundError, or StorageError.
        """
        if is_local(url):
            return read_bytes(url)
        path = self._path(url)
        self._paths.add(path)
        with contextlib.suppress(OSError):
            return self._used(path)
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(hold_lock(path.with_suffix(LOCK_SUFFIX), WAIT_SECONDS))
            except (OSError, LockHeld):
                return read_bytes(url)
            with contextlib.suppress(OSError):  # Another process may have fetched it while this one waited.
                return self._used(path)
            content = read_bytes(url)
            with contextlib.suppress(OSError):
                write_bytes_atomically(path, content, mode=ONLY_OWNER)
                self._remove_unused()
            return content

    def forget(self) -> None:
        """Remove the copies of all files that were asked for: one does not hold what it should."""
        for path in self._paths:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self, url: str) -> Path:
        name = f"{unsigned(url)} {self._version}".encode(errors="backslashreplace")
        return self._folder / f"{hashlib.sha256(name).hexdigest()[:24]}.json"

    def _used(self, path: Path) -> bytes:
        content = path.read_bytes()
        with contextlib.suppress(OSError):
            path.touch()
        return content

    def _remove_unused(self) -> None:
        for path in self._folder.iterdir():
            with contextlib.suppress(OSError):  # Another process may have removed it.
                if time.time() - path.stat().st_mtime > UNUSED_SECONDS:
                    path.unlink(missing_ok=True)
