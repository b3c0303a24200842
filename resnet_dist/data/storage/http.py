"""Files on web servers, whatever these make of HEAD, ranges, lengths, encodings and redirects.

fsspec's file system supplies the session, its event loop and its configuration (headers, proxies, credentials). The
requests are made here, because what an answer is follows from its status and headers, which fsspec does not return.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import IO, TYPE_CHECKING, Any

from resnet_dist.data.storage.retry import Patience
from resnet_dist.data.storage.urls import compression_of, request_url
from resnet_dist.errors import StorageError, UserError

if TYPE_CHECKING:
    from aiohttp import ClientResponse

CONNECT_SECONDS = 15.0
STALL_SECONDS = 30.0  # without a byte, then the request is repeated
USER_AGENT = "resnet-dist"  # some servers refuse aiohttp's own
BLOCK_BYTES = 2**18
MAX_PLAIN_BYTES = 2**22  # decompressed at a time: a few bytes may decompress to gigabytes
GZIP_MAGIC = b"\x1f\x8b"
MAX_ERROR_BYTES = 4096  # read of the body of an error
MAX_RETRY_AFTER_SECONDS = 3600.0
ADVICE = {
    401: "it wants a user and password or a token, in the URL, ~/.netrc or fsspec's configuration",
    403: "access is denied, or the signature of the URL is wrong or has expired",
    407: "the proxy wants a user and password",
}


class HttpError(OSError):
    """An answer with a status that is no success."""

    def __init__(self, status: int, text: str, retry_after_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.status, self.retry_after_seconds = status, retry_after_seconds


class HttpNotFound(HttpError, FileNotFoundError):
    """The answer of a server that does not have the file."""


class HttpFile:
    """A file on a web server."""

    def __init__(self, url: str, patience: Patience) -> None:
        import yarl

        self._patience = patience
        self._name_is_gzip = compression_of(url) == "gzip"
        try:
            self._url = yarl.URL(request_url(url), encoded=True)
            self._fs = _file_system()
            if not self._url.host:
                raise ValueError("has no host")
        except (ValueError, TypeError) as error:
            raise UserError(f"{patience.url}: {error}") from None
        self._has_ranges = True  # until an answer shows that the server has none

    def size(self) -> int | None:
        """Return the number of bytes; None where the server does not report it.

        Asks by a GET of one byte: HEAD is refused or answered wrongly by some servers, and is not covered by a
        signature for GET.
        """
        return self._patience.run(self._fs.loop, self._size())

    def append(self, file: IO[bytes], start: int, end: int | None, total: int | None) -> bool:
        """Append bytes `start` to `end` to `file`; where the server has no ranges, all from `start` on.

        end, total: None where they are unknown. Returns whether the file is complete.
        """
        return self._patience.run(self._fs.loop, self._append(file, start, end, total))

    async def _size(self) -> int | None:
        async with self._get(0, 1) as answer:
            if _encoding(answer):
                self._has_ranges = False
                return None
            if answer.status == HTTPStatus.OK:
                self._has_ranges = False
                return answer.content_length or None
            return _total_bytes(answer)

    async def _append(self, file: IO[bytes], start: int, end: int | None, total: int | None) -> bool:
        is_part = self._has_ranges and end is not None and not (start == 0 and end == total)
        async with self._get(start, end if is_part else None) as answer:
            if answer.status == HTTPStatus.OK:
                self._has_ranges = self._has_ranges and not is_part
                await self._copy(answer, file, start, total)
                return True
            if total is not None and not _encoding(answer):
                self._refuse_other_size(_total_bytes(answer), total)
            # 206, or 416: accept exactly what was asked for.
            expected = (end or 0) - start
            block = b""
            if is_part and answer.status == HTTPStatus.PARTIAL_CONTENT and _first_byte(answer) == start:
                while not _encoding(answer) and len(block) <= expected:
                    more = await answer.content.read(expected + 1 - len(block))
                    if not more:
                        break
                    block += more
            if len(block) > expected or _first_byte(answer) != start or _encoding(answer):
                self._has_ranges = False
                raise OSError(f"asked for bytes {start} to {end}, got others")
            if len(block) < expected:
                raise OSError(f"asked for bytes {start} to {end}, got {len(block)} bytes")
            if start == 0:
                self._refuse_page(block)
            file.write(block)
            return end == total

    async def _copy(self, answer: ClientResponse, file: IO[bytes], start: int, total: int | None) -> None:
        """Append a whole file from byte `start` on."""
        position = 0
        async for block in _decoded(answer, name_is_gzip=self._name_is_gzip):
            if position == 0:
                self._refuse_page(block)
                if total is not None and not _encoding(answer):
                    self._refuse_other_size(answer.content_length, total)
            new = block[max(0, start - position) :]
            position += len(block)
            if total is not None and position > total:
                raise self._other_size(f"more than {total:,}", total)
            if new:
                file.write(new)
                self._patience.progressed()
        if total is not None and position < total:
            raise OSError(f"the answer ended after {position:,} of {total:,} bytes")

    @asynccontextmanager
    async def _get(self, start: int, end: int | None) -> AsyncIterator[ClientResponse]:
        import aiohttp
        from multidict import CIMultiDict

        options = dict(self._fs.kwargs)
        headers = CIMultiDict(options.pop("headers", {}))
        if end is not None:
            headers["Range"] = f"bytes={start}-{end - 1}"
            if "timeout" not in options:
                # A server that sends a byte now and then must not hold a chunk forever.
                options["timeout"] = aiohttp.ClientTimeout(
                    total=4 * STALL_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS
                )
        session = await self._fs.set_session()
        async with session.get(self._url, headers=headers, auto_decompress=False, **options) as answer:
            is_end = answer.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and end is not None
            if not is_end and answer.status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                raise await _error_of(answer)
            yield answer

    def _refuse_other_size(self, found: int | None, total: int) -> None:
        if found and found != total:
            raise self._other_size(f"{found:,}", total)

    def _other_size(self, found: str, total: int) -> StorageError:
        return StorageError(
            f"{self._patience.url}: has {found} bytes, but the index records {total:,}; index the shards again if they "
            "were changed"
        )

    def _refuse_page(self, block: bytes) -> None:
        """Raise StorageError where a page for people came, such as that of a sign-in, and not the file."""
        start = block[:2048].removeprefix(b"\xef\xbb\xbf").lstrip()
        if start[:15].lower().startswith((b"<!doctype html", b"<html")):
            text = " ".join(
                re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", " ", start.decode(errors="replace")).split()
            )
            raise StorageError(
                f"{self._patience.url}: the server answers with a web page ({text[:60]!r}), not with the file; sign in, "
                "or give the URL of the file itself"
            )


def _file_system() -> Any:
    """Return fsspec's file system with its own configuration, to which our time-outs are defaults."""
    import aiohttp
    import fsspec
    from fsspec.config import apply_config
    from fsspec.implementations.http import HTTPFileSystem
    from multidict import CIMultiDict

    configured = dict(apply_config(HTTPFileSystem, {}).get("client_kwargs") or {})
    headers = CIMultiDict({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
    headers.update(configured.pop("headers", {}))
    if isinstance(seconds := configured.get("timeout"), int | float):
        configured["timeout"] = aiohttp.ClientTimeout(total=seconds)
    client = {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=STALL_SECONDS),
        "trust_env": True,  # http_proxy, https_proxy, no_proxy and ~/.netrc
        "requote_redirect_url": False,  # the target of a redirect may be signed
        "headers": headers,
        **configured,
    }
    return fsspec.filesystem("http", client_kwargs=client)


async def _error_of(answer: ClientResponse) -> HttpError:
    try:
        body = (await answer.content.read(MAX_ERROR_BYTES)).decode(errors="replace")
    except Exception:  # the status is known already
        body = ""
    # Object stores answer in XML. Show the code alone: the rest may quote the signature.
    code = re.search(r"<Code>(\w+)</Code>", body)
    notes = [note for note in (code and code[1], ADVICE.get(answer.status)) if note]
    text = f"{answer.status} {answer.reason or ''}".strip() + (f" ({'; '.join(notes)})" if notes else "")
    kind = HttpNotFound if answer.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE) else HttpError
    return kind(answer.status, text, _retry_after_seconds(answer.headers.get("Retry-After", "")))


def _retry_after_seconds(value: str) -> float:
    """Return the seconds of a Retry-After header: a number, or a date."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(0.0, seconds), MAX_RETRY_AFTER_SECONDS)


def _encoding(answer: ClientResponse) -> str:
    """Return the Content-Encoding; empty for none."""
    encoding: str = answer.headers.get("Content-Encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def _content_range(answer: ClientResponse) -> re.Match[str] | None:
    return re.match(r"bytes\s+(?:(\d+)-\d+|\*)/(\d+|\*)", answer.headers.get("Content-Range", ""))


def _first_byte(answer: ClientResponse) -> int | None:
    found = _content_range(answer)
    return int(found[1]) if found and found[1] else None


def _total_bytes(answer: ClientResponse) -> int | None:
    """Return the size of the whole file by the Content-Range header; None where it has none."""
    found = _content_range(answer)
    return int(found[2]) if found and found[2] != "*" else None


async def _decoded(answer: ClientResponse, *, name_is_gzip: bool) -> AsyncIterator[bytes]:
    """Yield the bytes of the file, without an encoding that the server added although none was asked for.

    Servers also label files that are compressed themselves with `Content-Encoding: gzip`: where what is inside is no
    gzip, a file with a gzip's name is meant as it came. A label on bytes that are no gzip is ignored.
    """
    encoding = _encoding(answer)
    blocks = answer.content.iter_chunked(BLOCK_BYTES)
    if not encoding:
        async for block in blocks:
            yield block
        return
    if encoding not in ("gzip", "x-gzip"):
        raise StorageError(
            f"{answer.url.with_user(None).with_query(None)}: sent with Content-Encoding: {encoding}, although none was "
            "asked for, which cannot be undone here"
        )
    start = b""
    async for block in blocks:
        start += block
        if len(start) >= 1024:
            break
    inside = zlib.decompressobj(wbits=31).decompress(start, 16) if start.startswith(GZIP_MAGIC) else None
    if inside is None or (name_is_gzip and not inside.startswith(GZIP_MAGIC)):
        yield start
        async for block in blocks:
            yield block
        return
    gzip = _Gunzip()
    for plain in gzip.plain(start):
        yield plain
    async for block in blocks:
        for plain in gzip.plain(block):
            yield plain
    if not gzip.is_complete:
        raise OSError("the answer ended inside its gzip encoding")


class _Gunzip:
    """A gzip of one or several members, block by block. Raises zlib.error."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)

    def plain(self, block: bytes) -> Iterator[bytes]:
        while block:
            if self._member.eof:
                self._member = zlib.decompressobj(wbits=31)
            yield self._member.decompress(block, MAX_PLAIN_BYTES)
            block = self._member.unconsumed_tail or self._member.unused_data

    @property
    def is_complete(self) -> bool:
        return self._member.eof
