"""Transfer of remote files: in chunks, each retried until it arrives or `timeout_seconds` pass without progress.

fsspec knows the schemes (s3, gs, hf …) and finds credentials where each of them usually keeps them; files on web
servers are read by `http`.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import IO, Any, Protocol

from resnet_dist.data.storage.http import STALL_SECONDS, HttpFile
from resnet_dist.data.storage.retry import Patience, Value
from resnet_dist.data.storage.s3 import stream_of
from resnet_dist.data.storage.urls import COMMAND, is_http, is_local, local_path, shown
from resnet_dist.errors import StorageError, UserError
from resnet_dist.system.redact import HIDDEN

CHUNK_BYTES = 4 * 2**20  # one request; a broken transfer loses at most this
POLL_SECONDS = 0.2  # between two looks at a running command, or at a full cache
INDEX_SECONDS = 60.0  # without progress: the patience with small files, such as indexes
LIST_SECONDS = 600.0  # for all pages of the list of a large bucket
MAGIC = "*["


def fetch_file(
    url: str,
    partial: Path,
    *,
    num_bytes: int,
    timeout_seconds: float,
    closed: threading.Event | None = None,
) -> None:
    """Append what is missing to `partial`, chunk by chunk, until it has `num_bytes` (0: unknown, ask the server).

    Every failure is retried after a pause that doubles, with a random part, so that many ranks do not retry at the
    same time; a server may ask for a longer one. Raises StorageError after `timeout_seconds` without a byte of
    progress, or at once where a retry cannot help.
    """
    patience = Patience(url, timeout_seconds, closed)
    remote = _open(url, patience)
    total = num_bytes or patience.retry(remote.size)
    have = partial.stat().st_size if partial.exists() else 0
    if total is not None and have > total:
        partial.unlink()
        have = 0
    with partial.open("ab") as file:

        def append() -> bool:
            start = file.tell()
            end = None if total is None else min(start + CHUNK_BYTES, total)
            return remote.append(file, start, end, total)

        is_complete = have == total
        while not is_complete:
            is_complete = patience.retry(append)


def read_bytes(url: str, timeout_seconds: float = INDEX_SECONDS) -> bytes:
    """Return the content of a small file, such as an index. Raises FileNotFoundError, or StorageError."""
    if is_local(url):
        return local_path(url).read_bytes()
    patience = Patience(url, timeout_seconds)
    remote = _open(url, patience)
    content = io.BytesIO()
    try:
        patience.retry(lambda: remote.append(content, content.tell(), None, None))
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise FileNotFoundError(shown(url)) from None
        raise
    return content.getvalue()


def exists(url: str) -> bool:
    """Report whether the file exists. Raises StorageError where that cannot be found out."""
    if url.startswith(COMMAND):
        return False
    if is_local(url):
        return local_path(url).is_file()
    patience = Patience(url, INDEX_SECONDS)
    remote = _open(url, patience)
    try:
        patience.retry(remote.size)
    except StorageError as error:
        if isinstance(error.__cause__, (FileNotFoundError, IsADirectoryError)):
            return False
        raise
    return True


def has_stars(url: str) -> bool:
    """Report whether a URL may be a pattern of files in a store."""
    return any(character in url for character in MAGIC)


def list_files(url: str, *, any_depth: bool = False) -> list[str] | None:
    """Return the files that a remote pattern (`…/train-*.tar`) or folder names, sorted.

    any_depth: those in the folders of a folder too. None where `url` names one file, or its store cannot list. Raises StorageError, or UserError.
    """
    patience = Patience(url, LIST_SECONDS)
    store = _open(url, patience)
    return (
        None if isinstance(store, HttpFile) else patience.retry(lambda: store.list_files(any_depth=any_depth))
    )


class _Remote(Protocol):
    """A remote file, which is read in parts. See HttpFile."""

    def size(self) -> int | None: ...

    def append(self, file: IO[bytes], start: int, end: int | None, total: int | None) -> bool: ...


def _open(url: str, patience: Patience) -> HttpFile | _StoredObject:
    if f"{HIDDEN}@" in url or f"={HIDDEN}" in url:
        raise UserError(
            f"{shown(url)}: the password or signature was left out where this URL was stored or shown; give the whole URL"
        )
    return HttpFile(url, patience) if is_http(url) else _StoredObject(url, patience)


class _StoredObject:
    """An object in a store that fsspec reads."""

    def __init__(self, url: str, patience: Patience) -> None:
        import fsspec

        self._patience = patience
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{patience.url}: {error}") from None
        # Some schemes connect at once, such as ftp, and fail as their library does.
        except Exception as error:
            raise StorageError(f"{patience.url}: {str(error) or type(error).__name__}") from error
        self._stream = stream_of(self._fs, self._path)

    def size(self) -> int | None:
        size = self._call("info", self._path).get("size")
        if size is None:
            raise StorageError(f"{self._patience.url}: the server does not report its size")
        return int(size)

    def append(self, file: IO[bytes], start: int, end: int | None, total: int | None) -> bool:
        if self._stream is None or total is None:
            return self._append(file, start, end, total)
        block = self._await(functools.partial(self._stream.read, start, CHUNK_BYTES), is_limited=True)
        if block is None:
            is_complete = self._append(file, start, end, total)
            self._stream.was_replaced()
            return is_complete
        if self._stream.size != total:
            raise self._other_size(self._stream.size, total)
        file.write(block)
        return start + len(block) >= total

    def _append(self, file: IO[bytes], start: int, end: int | None, total: int | None) -> bool:
        # Request a whole file without a range: the server may not support ranges.
        whole = start == 0 and end == total
        limits = {} if whole else {"start": start, "end": end}
        block: bytes = self._call("cat_file", self._path, **limits)
        if total is not None and len(block) > total:
            raise self._other_size(len(block), total)
        if end is not None and len(block) > end - start:
            # A server without ranges sends the whole file; if some of it is missing, request it again.
            if len(block) != total:
                raise OSError(f"asked for bytes {start} to {end}, got {len(block)} bytes")
            block = block[start:]
        if not block and total != 0:
            raise OSError(f"no bytes from {start} on")
        file.write(block)
        return total is None or start + len(block) >= total

    def list_files(self, *, any_depth: bool) -> list[str] | None:
        path = self._path
        if not has_stars(path):
            if self._call("isfile", path) or not self._call("isdir", path):
                return None
            if any_depth:
                return sorted(self._fs.unstrip_protocol(found) for found in self._call("find", path))
            pattern = f"{path.rstrip('/')}/*"
        elif self._call("exists", path):  # the name of one object
            return None
        else:
            pattern = path
        return sorted(self._fs.unstrip_protocol(found) for found in self._call("glob", pattern))

    def _other_size(self, found: int, total: int) -> StorageError:
        return StorageError(
            f"{self._patience.url}: has {found:,} bytes, but the index records {total:,}; index the shards again if they "
            "were changed"
        )

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the file system so that it can be cancelled, or else abandoned."""
        if not getattr(self._fs, "async_impl", False):
            function: Callable[..., Any] = getattr(self._fs, method)
            return self._patience.call(lambda: function(*arguments, **options))

        # Limit every request here: not every scheme has a timeout of its own for a server that stops sending.
        is_limited = method == "cat_file" and bool(options)
        function = functools.partial(getattr(self._fs, f"_{method}"), *arguments, **options)
        return self._await(function, is_limited=is_limited)

    def _await(self, function: Callable[[], Coroutine[Any, Any, Value]], *, is_limited: bool) -> Value:
        async def run() -> Value:
            import asyncio

            async with asyncio.timeout(4 * STALL_SECONDS if is_limited else None):
                return await function()

        return self._patience.run(self._fs.loop, run())


def size_of(path: Path) -> int:
    """Return the bytes of a file that another process may write; 0 where that process has just renamed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
