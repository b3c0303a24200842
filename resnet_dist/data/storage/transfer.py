"""Transfer of remote files: in chunks, each retried until it arrives or `timeout_seconds` pass without progress.

fsspec knows the schemes (https, s3, gs, hf …) and finds credentials where each of them usually keeps them.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_dist.data.storage.urls import COMMAND, is_local, local_path
from resnet_dist.errors import StorageError, UserError

CHUNK_BYTES = 4 * 2**20  # one request; a broken transfer loses at most this
STALL_SECONDS = 30.0  # without a byte, then the chunk is requested again
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.2, 20.0
POLL_SECONDS = 0.2  # between two looks at a running command, or at a full cache

# Errors that no retry can cure.
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError)
# Names of errors of botocore and Google's drivers: by name, because these drivers may not be installed.
NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
}


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
    same time. Raises StorageError after `timeout_seconds` without a byte of progress, or at once where a retry
    cannot help.
    """
    remote = _Remote(url)
    closed = closed or threading.Event()
    total = num_bytes or retry(remote.size, url, timeout_seconds, closed)
    have = partial.stat().st_size if partial.exists() else 0
    if have > total:
        partial.unlink()
        have = 0
    with partial.open("ab") as file:
        while have < total:
            end = min(have + CHUNK_BYTES, total)
            block = retry(lambda: remote.read(have, end, total), url, timeout_seconds, closed)  # noqa: B023
            file.write(block)
            have += len(block)


def read_bytes(url: str, timeout_seconds: float = 60.0) -> bytes:
    """Return the content of a small file, such as an index. Raises FileNotFoundError, or StorageError."""
    if is_local(url):
        return local_path(url).read_bytes()
    remote = _Remote(url)
    try:
        content: bytes = retry(lambda: remote.read(0, None, None), url, timeout_seconds)
        return content
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise FileNotFoundError(url) from None
        raise


def exists(url: str) -> bool:
    """Report whether the file exists and can be reached."""
    if is_local(url):
        return local_path(url).is_file()
    try:
        return bool(_Remote(url).size())
    except OSError:
        return False


def retry(
    read: Callable[[], Any], url: str, timeout_seconds: float, closed: threading.Event | None = None
) -> Any:
    """Call `read` until it succeeds and return its result.

    Raises StorageError for a permanent error, after `timeout_seconds`, and when `closed` is set, which ends a pause.
    """
    closed = closed or threading.Event()
    deadline, pause = time.monotonic() + timeout_seconds, FIRST_PAUSE_SECONDS
    while not closed.is_set():
        try:
            return read()
        except StorageError:
            raise
        except Exception as error:  # every scheme, and every driver below it, has its own classes
            if _is_permanent(error):
                raise StorageError(f"{url}: {_describe(error)}") from error
            if time.monotonic() + pause > deadline:
                raise StorageError(
                    f"{url}: nothing could be read for {timeout_seconds:.0f} s; the last error was {_describe(error)}"
                ) from error
        closed.wait(pause * random.uniform(0.5, 1))
        pause = min(2 * pause, MAX_PAUSE_SECONDS)
    raise StorageError(f"{url}: given up, the loader was closed")


class _Remote:
    """A remote file, read in parts."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._url = url
        options: dict[str, Any] = {}
        if url.startswith(("http://", "https://")):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
            options["client_kwargs"] = {"timeout": timeout}
        try:
            self._fs, self._path = fsspec.core.url_to_fs(url, **options)
        except (ImportError, ValueError) as error:
            raise UserError(f"{url}: {error}") from None

    def size(self) -> int:
        size = self._fs.info(self._path).get("size")
        if size is None:
            raise StorageError(f"{self._url}: the server does not report its size")
        return int(size)

    def read(self, start: int, end: int | None, total: int | None) -> bytes:
        """Return the bytes from `start` to `end` (None: to the last one), at least one byte."""
        # Request a whole file without a range: the server may not support ranges.
        whole = start == 0 and end == total
        block: bytes = self._cat(None if whole else start, None if whole else end)
        if end is not None and len(block) > end - start:
            if total is not None and len(block) > total:
                raise StorageError(
                    f"{self._url}: has {len(block):,} bytes, but the index records {total:,}; index the shards again if "
                    "they were changed"
                )
            # A server without ranges sends the whole file; if some of it is missing, request it again.
            if len(block) != total:
                raise OSError(f"asked for bytes {start} to {end}, got {len(block)} bytes")
            block = block[start:]
        if not block:
            raise OSError(f"no bytes from {start} on")
        return block

    def _cat(self, start: int | None, end: int | None) -> bytes:
        if not getattr(self._fs, "async_impl", False):
            return self._fs.cat_file(self._path, start=start, end=end)  # type: ignore[no-any-return]
        from fsspec.asyn import sync

        # Limit every request here: not every scheme has a timeout of its own for a server that stops sending.
        timeout = None if end is None else 4 * STALL_SECONDS
        return sync(self._fs.loop, self._fs._cat_file, self._path, start=start, end=end, timeout=timeout)  # type: ignore[no-any-return]


def _is_permanent(error: BaseException) -> bool:
    status = _status(error)
    if status is not None and 400 <= status < 500:
        return status not in (408, 425, 429)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, (*PERMANENT, UserError)) or not kinds.isdisjoint(NO_CREDENTIALS)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status: aiohttp's `status`, gcsfs' `code`, or `response.status_code` of requests and httpx."""
    owners = (error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")
    found = next((getattr(owner, name) for owner, name in owners if hasattr(owner, name)), None)
    return int(found) if isinstance(found, int) or (isinstance(found, str) and found.isdecimal()) else None


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def run_command(url: str, partial: Path, timeout_seconds: float, closed: threading.Event) -> None:
    """Run `pipe:COMMAND` in a shell and write its output to `partial`.

    Raises StorageError where the command fails, or writes nothing for `timeout_seconds`, or when `closed` is set.
    """
    with partial.open("wb") as target, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            url.removeprefix(COMMAND), shell=True, stdout=target, stderr=errors, start_new_session=True
        )
        size, since, problem = -1, time.monotonic(), None
        while problem is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
                break
            if size_of(partial) != size:
                size, since = size_of(partial), time.monotonic()
            if time.monotonic() - since > timeout_seconds:
                problem = f"wrote nothing for {timeout_seconds:.0f} s"
            elif closed.is_set():
                problem = "given up, the loader was closed"
        if problem is not None:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and its children
            process.wait()
        elif process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
            problem = f"ended with {process.returncode}: {lines[-1] if lines else 'no message'}"
    if problem is not None:
        partial.unlink()
        raise StorageError(f"{url}: {problem}")


def size_of(path: Path) -> int:
    """Return the bytes of a file that another process may write; 0 where that process has just renamed it."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
