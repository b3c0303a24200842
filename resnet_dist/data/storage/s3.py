"""The bytes of objects in S3, read by obstore: a fraction of the CPU and of the time that fsspec's driver takes.

fsspec's file system supplies endpoint, region and credentials, wherever it has found them. What obstore does not read,
for whatever reason, the caller reads through fsspec: so all errors, and the patience with them, are fsspec's.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import Any

from resnet_dist.data.storage.http import CONNECT_SECONDS

log = logging.getLogger(__name__)
PROTOCOL, DEFAULT_REGION = "s3", "us-east-1"
# Arguments of a client that obstore is given too. With others, such as a certificate, fsspec reads all.
KNOWN_ARGUMENTS = {
    "endpoint_url",
    "region_name",
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
}
# For which an answer of botocore is used; it renews its own long before they expire.
CREDENTIALS_SECONDS = 300.0
REQUEST_SECONDS = 86_400.0  # of a whole shard: the caller limits the time of each block
MAX_FAILURES = 3  # at the beginning, after which fsspec reads all


class S3Stream:
    """An object that is read in sequence by one request. All calls are made on the loop of its file system."""

    def __init__(self, bucket: S3Bucket, key: str) -> None:
        self._bucket, self._key = bucket, key
        self._blocks: Any = None
        self._position = 0  # of the next block
        self._error: Exception | None = None  # of the last read
        self.size = 0  # of the whole object, once something was read

    async def read(self, start: int, num_bytes: int) -> bytes | None:
        """Return a block of about `num_bytes` from `start` on; None where obstore cannot read it."""
        blocks, self._blocks, self._error = self._blocks, None, None
        if not self._bucket.is_used:
            return None
        try:
            if blocks is None or self._position != start:
                blocks, self.size = await self._bucket.open(self._key, start, num_bytes)
            block: bytes = await anext(blocks)
        except Exception as error:  # obstore raises its own classes, and Python's for some of them
            self._error = error
            return None
        self._blocks, self._position = blocks, start + len(block)
        self._bucket.has_worked = True
        return block

    def was_replaced(self) -> None:
        """Record that fsspec could read what this could not."""
        if self._error is not None:
            self._bucket.failed(self._error)


class S3Bucket:
    """A bucket as obstore reads it."""

    def __init__(self, fs: Any, name: str) -> None:
        self.fs, self._name = fs, name
        self._store: Any = None
        self._failures = 0
        self.has_worked = False

    @property
    def is_used(self) -> bool:
        return self._failures < MAX_FAILURES

    async def open(self, key: str, start: int, block_bytes: int) -> tuple[Any, int]:
        """Return a stream of blocks from byte `start` to the end, and the size of the whole object."""
        import obstore

        if self._store is None:
            self._store = await self._connect()
        result = await obstore.get_async(self._store, key, options={"range": {"offset": start}})
        return aiter(result.stream(min_chunk_size=block_bytes)), result.meta["size"]

    def failed(self, error: Exception) -> None:
        """Record that fsspec could read what obstore could not."""
        if self.has_worked:  # The server or the network failed, not what obstore is asked for.
            return
        self._failures += 1
        if not self.is_used:
            reason = type(error).__name__
            log.info("s3://%s is read through fsspec, since obstore cannot read it (%s)", self._name, reason)

    async def _connect(self) -> Any:
        from obstore.store import S3Store

        client = await self.fs.set_session()
        endpoint = client.meta.endpoint_url
        signed = (
            {"skip_signature": True} if self.fs.anon else {"credential_provider": await _credentials(self.fs)}
        )
        return S3Store(
            self._name,
            endpoint=endpoint,
            aws_endpoint_url_s3=endpoint,  # The variable of this name would have precedence.
            region=client.meta.region_name or DEFAULT_REGION,
            client_options={
                "timeout": timedelta(seconds=REQUEST_SECONDS),
                "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                "allow_http": endpoint.startswith("http://"),
            },
            retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=CONNECT_SECONDS)},
            **signed,
        )


_buckets: dict[tuple[Any, str], S3Bucket] = {}


def stream_of(fs: Any, path: str) -> S3Stream | None:
    """Return the object as obstore reads it; None where fsspec has to."""
    if PROTOCOL not in _protocols(fs) or not _is_plain(fs):
        return None
    try:
        import obstore  # noqa: F401
    except ImportError:
        return None
    name, key, version = fs.split_path(path)
    if version or not key:
        return None
    bucket = _buckets.get((fs, name))
    if bucket is None or bucket.fs is not fs:  # Equal ones may have been made for another endpoint.
        bucket = _buckets[fs, name] = S3Bucket(fs, name)
    return S3Stream(bucket, key) if bucket.is_used else None


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _is_plain(fs: Any) -> bool:
    """Report whether the file system is s3fs's, and is set to nothing that obstore would not know of."""
    unknown = ("config_kwargs", "s3_additional_kwargs", "req_kw", "cache_regions")
    arguments = getattr(fs, "client_kwargs", None)
    return (
        arguments is not None
        and set(arguments) <= KNOWN_ARGUMENTS
        and not any(getattr(fs, n, None) for n in unknown)
    )


async def _credentials(fs: Any) -> Any:
    """Return the function that obstore asks for credentials: those of the file system, else those that botocore finds."""
    given = {**fs.client_kwargs}
    key = fs.key or given.get("aws_access_key_id")
    secret = fs.secret or given.get("aws_secret_access_key")
    token = fs.token or given.get("aws_session_token")
    found = None if key else await fs.session.get_credentials()
    if not key and found is None:
        raise LookupError("no credentials")  # fsspec then says so

    async def credentials() -> dict[str, Any]:
        own = (key, secret, token)
        if found is not None:
            frozen = await found.get_frozen_credentials()
            own = (frozen.access_key, frozen.secret_key, frozen.token)
        expires_at = datetime.now(UTC) + timedelta(seconds=CREDENTIALS_SECONDS)
        return {
            **dict(zip(("access_key_id", "secret_access_key", "token"), own, strict=True)),
            "expires_at": expires_at,
        }

    return credentials
