"""The patience of one transfer: what is retried, how long, and how it ends when the command does.

No call here blocks longer than `POLL_SECONDS` once `closed` is set or the main thread is interrupted: a request that
hangs is cancelled where its driver allows it, and abandoned in a daemon thread where it does not.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

from resnet_dist.data.storage.urls import shown
from resnet_dist.errors import StorageError, UserError
from resnet_dist.system.files import is_disk_full
from resnet_dist.system.redact import redact

log = logging.getLogger(__name__)
Value = TypeVar("Value")

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.2, 20.0
POLL_SECONDS = 0.1  # between two looks at whether to give up
# A wait is reported after this time, and then at this interval.
FIRST_REPORT_SECONDS, REPORT_SECONDS = 10.0, 60.0
MAX_REFUSALS = 4  # tries to reach a host that does not exist or refuses, unless it has answered before

# Errors that no retry can cure.
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError)
# Names of errors of aiohttp, botocore and Google's drivers: by name, because these drivers may not be installed.
PERMANENT_NAMES = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "ProfileNotFound",
    "DefaultCredentialsError",
    "InvalidURL",
    "TooManyRedirects",
    "ClientConnectorCertificateError",
}
REFUSED_NAMES = {"EndpointConnectionError", "ClientConnectorDNSError", "ClientConnectorSSLError"}
PERMANENT_SERVER_ERRORS = (501, 505, 511)  # others of 500 and above are retried
RETRIED_CLIENT_ERRORS = (408, 425, 429)

_answered: set[str] = (
    set()
)  # hosts that have answered this process: if one is gone, it may only be restarting


class Patience:
    """The patience with one file: `timeout_seconds` without progress; none once `closed` is set."""

    def __init__(self, url: str, timeout_seconds: float, closed: threading.Event | None = None) -> None:
        self.url, self.timeout_seconds = shown(url), timeout_seconds
        self._host = urlsplit(self.url).netloc if "://" in url else url
        self._closed = closed or threading.Event()
        self._problem = ""
        self._refusals = 0
        self.progressed()

    def progressed(self) -> None:
        """Restart the time: something has arrived."""
        self._since = time.monotonic()
        self._report_at = self._since + FIRST_REPORT_SECONDS
        self._pause = FIRST_PAUSE_SECONDS

    def retry(self, read: Callable[[], Value]) -> Value:
        """Call `read` until it succeeds and return its result.

        Raises StorageError for a permanent error, after `timeout_seconds` without progress, and when `closed` is set.
        """
        self.progressed()
        while True:
            self.check()
            try:
                value = read()
            except StorageError:
                raise
            except Exception as error:  # every scheme, and every driver below it, has its own classes
                self._pause_after(error)
            else:
                _answered.add(self._host)
                return value

    def run(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Value]) -> Value:
        """Run a coroutine on the loop of another thread; cancel it when this gives up."""
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return self._result(future)
        except BaseException:
            future.cancel()
            raise

    def call(self, function: Callable[[], Value]) -> Value:
        """Call a function that may block forever, in a daemon thread, which is abandoned when this gives up."""
        future: Future[Value] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # raised again by `_result`
                future.set_exception(error)

        threading.Thread(target=run, name="storage", daemon=True).start()
        return self._result(future)

    def check(self, waiting_for: str = "an answer") -> None:
        """Raise StorageError when `closed` is set; report a wait that is long."""
        if self._closed.is_set():
            raise StorageError(f"{self.url}: given up, the loader was closed")
        now = time.monotonic()
        if now >= self._report_at:
            self._report_at = now + REPORT_SECONDS
            problem = f"; the last error was {self._problem}" if self._problem else ""
            log.warning(
                "%s: has waited %.0f s for %s%s; gives up after %.0f s",
                self.url,
                now - self._since,
                waiting_for,
                problem,
                self.timeout_seconds,
            )

    def pause(self, seconds: float, waiting_for: str = "an answer") -> None:
        """Sleep. Raises StorageError when `closed` is set meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._closed.wait(min(left, 1.0))
            self.check(waiting_for)

    def is_over(self) -> bool:
        """Report whether `timeout_seconds` have passed without progress."""
        return time.monotonic() - self._since > self.timeout_seconds

    def _result(self, future: Future[Value]) -> Value:
        while not wait([future], POLL_SECONDS).done:
            self.check()
            if self.is_over():  # Not every driver has a time-out of its own.
                raise StorageError(f"{self.url}: nothing could be read for {self.timeout_seconds:.0f} s")
        return future.result()

    def _pause_after(self, error: Exception) -> None:
        """Sleep before the next try. Raises StorageError where no other try is due."""
        self._problem = describe(error)
        if is_permanent(error):
            raise StorageError(f"{self.url}: {self._problem}") from error
        if is_refused(error) and self._host not in _answered:
            self._refusals += 1
            if self._refusals >= MAX_REFUSALS:
                raise StorageError(
                    f"{self.url}: {self._problem}, {self._refusals} times; check the address, or the proxy"
                ) from error
        seconds = max(self._pause * random.uniform(0.5, 1), getattr(error, "retry_after_seconds", 0.0))
        if time.monotonic() + seconds > self._since + self.timeout_seconds:
            raise StorageError(
                f"{self.url}: nothing could be read for {self.timeout_seconds:.0f} s; the last error was "
                f"{self._problem}"
            ) from error
        self._pause = min(2 * self._pause, MAX_PAUSE_SECONDS)
        self.pause(seconds)


def is_permanent(error: BaseException) -> bool:
    """Report whether no retry can cure the error."""
    status = _status(error)
    if status is not None and status >= 300:
        if status < 500:
            return status not in RETRIED_CLIENT_ERRORS
        return status in PERMANENT_SERVER_ERRORS
    if found_no_room(error):  # Room is the business of the caller, who may have some to free.
        return True
    return isinstance(error, (*PERMANENT, UserError)) or not _names(error).isdisjoint(PERMANENT_NAMES)


def found_no_room(error: BaseException) -> bool:
    """Report whether the disk of this machine has no room for what was read."""
    return any(is_disk_full(cause) for cause in _causes(error))


def is_refused(error: BaseException) -> bool:
    """Report whether the host does not exist or refuses connections."""
    return any(
        isinstance(cause, (ConnectionRefusedError, socket.gaierror))
        or not _names(cause).isdisjoint(REFUSED_NAMES)
        for cause in _causes(error)
    )


def describe(error: BaseException) -> str:
    """Return the error in words, without passwords and signatures."""
    causes = list(_causes(error))
    via = " of the proxy" if any("Proxy" in name for name in _names(error)) else ""
    host = getattr(error, "host", None)
    host = (getattr(error, "_conn_key", None) and f"{error._conn_key.host}:{error._conn_key.port}") or host  # type: ignore[attr-defined]
    where = f" {host}" if host else ""
    if any(
        isinstance(cause, socket.gaierror) or "ClientConnectorDNSError" in _names(cause) for cause in causes
    ):
        return f"unknown host{where}{via}"
    if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
        return f"connection refused by{where or ' the host'}{via}"
    if isinstance(error, TimeoutError) and not str(error):
        return "no answer in time"
    text = str(error)
    return redact(
        text if hasattr(error, "retry_after_seconds") else f"{type(error).__name__}: {text}".rstrip(": ")
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and what it was raised from; aiohttp keeps the cause of a failed connection in `os_error`."""
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        cause = queue.pop()
        if isinstance(cause, BaseException) and cause not in seen:
            seen.append(cause)
            yield cause
            queue += [cause.__cause__, cause.__context__, getattr(cause, "os_error", None)]


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """Return the HTTP status: aiohttp's `status`, gcsfs' `code`, or `response.status_code` of requests and httpx."""
    owners = (error, "status"), (error, "code"), (getattr(error, "response", None), "status_code")
    found = next((getattr(owner, name) for owner, name in owners if hasattr(owner, name)), None)
    return int(found) if isinstance(found, int) or (isinstance(found, str) and found.isdecimal()) else None
