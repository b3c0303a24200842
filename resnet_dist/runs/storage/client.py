"""Calls to an object store through obstore: retried with pauses that double, and their errors in one sentence.

Credentials, region and endpoint come from the usual variables (AWS_*, GOOGLE_*, AZURE_*); none is shown or stored.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.storage.protocol import Unreachable
from resnet_dist.system.redact import redact

Value = TypeVar("Value")

# One request, and a call with its retries. Small requests follow one another in loops that must not stand still.
SMALL_SECONDS, SMALL_RETRY_SECONDS = 10.0, 15.0
LARGE_SECONDS, LARGE_RETRY_SECONDS = 120.0, 60.0
CONNECT_SECONDS = 5.0
MAX_PAUSE_SECONDS, RETRY_SECONDS = 5.0, 0.2
# Before anything starts a person waits. A name that DNS does not know is mistyped; a server may be about to start.
UNKNOWN_SECONDS, REFUSED_SECONDS = 2.0, 8.0
ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

# Words in an error, and the sentence that explains it. The first that fits is used.
CREDENTIALS = "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN"
PERMANENT = (
    (
        r"169\.254\.169\.254|metadata\.google|MissingCredential",
        f"no credentials were found; set {CREDENTIALS}",
    ),
    (
        "RequestTimeTooSkewed",
        "the clock of this machine differs too much from that of the store; set it, by NTP",
    ),
    ("NoSuchBucket", "there is no such bucket; create it, or check the name and AWS_ENDPOINT_URL"),
    (
        "PermanentRedirect|AuthorizationHeaderMalformed|301 Moved",
        "the bucket is in another region; set AWS_REGION to the bucket's",
    ),
    (
        "InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken|InvalidToken|401 Unauthorized",
        f"the store does not accept the credentials; check {CREDENTIALS}",
    ),
    (
        "AccessDenied|403 Forbidden",
        f"access is denied: {CREDENTIALS} must be allowed to read, write, list and delete there",
    ),
    (
        "NotImplemented|501 Not",
        "the store does not support a request that runs need, such as a write on condition",
    ),
)
# Ceph answers 403 and MinIO 507: a person, or what removes old objects, makes room.
FULL = r"QuotaExceeded|StorageFull|507 Insufficient"
UNKNOWN = r"dns error|failed to lookup|Name or service not known"
REFUSED = r"Connection refused|ConnectError|tcp connect error"
PASSING = (
    (FULL, "it has no room left"),
    (UNKNOWN, "the host of its endpoint is unknown"),
    (REFUSED, "its endpoint refuses connections"),
    (r"operation timed out|TimedOut|timed out", "it does not answer in time"),
    (r"\b5\d\d [A-Z][a-z]+", "it answers with errors"),
)


class Client:
    """The calls to one bucket. Safe in any thread; a signal ends a call of the main thread at once."""

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            import obstore
        except ImportError:
            raise UserError(
                f"{url}: obstore, which reads and writes it, is not installed; uv pip install obstore"
            ) from None
        self.library: Any = obstore
        self._small = _connect(url, SMALL_SECONDS, SMALL_RETRY_SECONDS)
        self._large = _connect(url, LARGE_SECONDS, LARGE_RETRY_SECONDS)

    def call(
        self, function: Callable[..., Value], *arguments: Any, large: bool = False, **options: Any
    ) -> Value:
        """Return `function(store, …)`.

        Raises what obstore raises for an object that is missing, exists, or has another version; StorageError for all
        else. large: it moves more than a few kilobytes.
        """
        errors = self.library.exceptions
        store, seconds = (self._large, LARGE_RETRY_SECONDS) if large else (self._small, SMALL_RETRY_SECONDS)
        begin, pause = time.monotonic(), threading.Event()
        while True:
            try:
                return _interruptible(lambda: function(store, *arguments, **options))
            except (FileNotFoundError, errors.AlreadyExistsError, errors.PreconditionError):
                raise
            except Exception as error:  # obstore raises its own classes, and Python's for some of them
                problem = explained(self.url, error)
                # obstore has retried what it can; it does not retry an answer that breaks off.
                if not isinstance(problem, Unreachable) or time.monotonic() - begin >= seconds:
                    raise problem from error
            pause.wait(RETRY_SECONDS)

    def meet(self) -> None:
        """Connect once. Raises Unreachable, within seconds, where no server is at the address of the store.

        All other errors are left to the calls that follow: they explain them, and wait for what may pass.
        """
        once, begin, pause = _connect(self.url, SMALL_SECONDS, 0.0), time.monotonic(), threading.Event()
        while True:
            try:
                _interruptible(lambda: self.library.head(once, ".check"))
            except Exception as error:  # obstore raises its own classes, and Python's for some of them
                problem, text = explained(self.url, error), str(error)
                seconds = UNKNOWN_SECONDS if re.search(UNKNOWN, text) else REFUSED_SECONDS
                if not isinstance(problem, Unreachable) or not re.search(f"{UNKNOWN}|{REFUSED}", text):
                    return
                if time.monotonic() - begin >= seconds:
                    raise problem from error
            else:
                return
            pause.wait(RETRY_SECONDS)


@lru_cache(maxsize=8)
def _client(url: str, variables: tuple[str | None, ...]) -> Client:
    return Client(url)


def client_of(url: str) -> Client:
    """Return the client of a bucket, which calls of this process share while the variables stay the same."""
    return _client(url, tuple(value for name, value in sorted(os.environ.items()) if name.startswith("AWS_")))


def explained(url: str, error: Exception) -> StorageError:
    """Return the error in one sentence: Unreachable where another try may succeed."""
    text = str(error)
    host = endpoint()
    where = f"{url} at {host}" if host else url
    for pattern, sentence in PERMANENT:
        if re.search(pattern, text) and not re.search(FULL, text):
            return StorageError(f"{where}: {sentence}")
    for pattern, sentence in PASSING:
        if re.search(pattern, text):
            return Unreachable(f"{where}: {sentence} ({_short(text)})")
    return Unreachable(f"{where}: {_short(text)}")


def endpoint() -> str | None:
    """Return the address of the S3 server that the environment names, without a password; None for Amazon's."""
    return next((redact(value) for name in ENDPOINT_VARIABLES if (value := os.environ.get(name))), None)


def _connect(url: str, seconds: float, retry_seconds: float) -> Any:
    from obstore.store import from_url

    address = next((value for name in ENDPOINT_VARIABLES if (value := os.environ.get(name))), "")
    try:
        return from_url(
            url,
            client_options={
                "timeout": timedelta(seconds=seconds),
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "allow_http": address.startswith("http://"),
            },
            retry_config={
                "max_retries": 1000,  # The time limits them.
                "retry_timeout": timedelta(seconds=retry_seconds),
                "backoff": {
                    "init_backoff": timedelta(seconds=0.1),
                    "max_backoff": timedelta(seconds=MAX_PAUSE_SECONDS),
                    "base": 2,
                },
            },
            **_profile(url),
        )
    except Exception as error:  # obstore raises several types for a URL or a variable
        raise UserError(f"{url}: {_short(str(error))}") from None


def _profile(url: str) -> dict[str, Any]:
    """Return a provider for the credentials that AWS_PROFILE names, which obstore does not read by itself."""
    if not url.startswith("s3") or not os.environ.get("AWS_PROFILE") or os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        name = os.environ["AWS_PROFILE"]
        raise UserError(
            f"AWS_PROFILE={name} needs boto3, which is not installed; uv pip install boto3"
        ) from None
    return {"credential_provider": Boto3CredentialProvider()}


def _interruptible(function: Callable[[], Value]) -> Value:
    """Call a function that blocks without Python's signal handlers; in the main thread, let them run meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        return function()
    future: Future[Value] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # raised again below
            future.set_exception(error)

    # A daemon thread: it is abandoned where a handler raises.
    threading.Thread(target=run, name="store", daemon=True).start()
    return future.result()


def _short(text: str) -> str:
    """Return what a person can use of an error: the message of the server, or the first words."""
    found = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    words = (
        found[1]
        if found
        else re.split(r"\s*(?:<\?xml|Debug source|, after \d+ retries| - HTTP error)", text)[0]
    )
    return redact(" ".join(words.split()))[:300].rstrip(": ")


def root_of(url: str) -> tuple[str, str]:
    """Return the URL of the bucket, and the prefix in it. Raises UserError for a URL that holds credentials."""
    parts = urlsplit(url)
    if "@" in parts.netloc:
        raise UserError(
            f"{redact(url)}: holds credentials, and a run records its URL; set {CREDENTIALS} instead"
        )
    if not parts.netloc or parts.query or parts.fragment:
        raise UserError(f"{redact(url)}: not a bucket and a prefix; give {parts.scheme}://BUCKET/PREFIX")
    return f"{parts.scheme}://{parts.netloc}", parts.path.strip("/")
