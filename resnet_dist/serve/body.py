"""The body of a request: read up to a limit before anything looks at it, and cut into images."""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# Flask's own parser, which MLflow needs too: Starlette's would need one more package.
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

MAX_BODY_BYTES = 64 * 2**20
MAX_IMAGES = 256  # of a request
# Bodies of all requests at a time; more are refused until some are answered.
MAX_WAITING_BYTES = 1024 * 2**20
# A client mostly reads no answer before it has sent its body: so much more of it is read and dropped.
MAX_DROPPED_BYTES = 256 * 2**20

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


class Refused(Exception):
    """A request that is answered with a status of 4xx or 5xx and one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status

    @property
    def content(self) -> bytes:
        """The answer, in the form of MLflow's own."""
        return json.dumps({"error_code": CODES[self.status], "message": str(self)}).encode()


CODES = {
    400: "INVALID_PARAMETER_VALUE",
    413: "REQUEST_LIMIT_EXCEEDED",
    415: "INVALID_PARAMETER_VALUE",
    503: "TEMPORARILY_UNAVAILABLE",
}


class Limits:
    """An application that reads each body before it calls another one, and refuses bodies that are too large."""

    def __init__(
        self,
        application: Application,
        max_body_bytes: int = MAX_BODY_BYTES,
        max_waiting_bytes: int = MAX_WAITING_BYTES,
    ) -> None:
        self._application = application
        self._max_body_bytes, self._max_waiting_bytes = max_body_bytes, max_waiting_bytes
        self._waiting_bytes = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._application(scope, receive, send)
            return
        counted = _Counted()
        try:
            body = await self._read(receive, counted)
            if body is not None:
                await self._application(scope, _replayed(body, receive), send)
        except Refused as refused:
            await _answer(send, refused)
        finally:
            self._waiting_bytes -= counted.num_bytes

    async def _read(self, receive: Receive, counted: _Counted) -> bytes | None:
        """Return the body; None where the client has left. Raises Refused, after what the client sends still."""
        parts: list[bytes] = []
        refused: Refused | None = None
        num_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            num_bytes += len(part)
            if refused is None and (refused := self._problem(num_bytes, len(part))) is None:
                parts.append(part)
                counted.num_bytes += len(part)
                self._waiting_bytes += len(part)
            elif num_bytes > MAX_DROPPED_BYTES + self._max_body_bytes:
                break
        if refused is not None:
            raise refused
        return b"".join(parts)

    def _problem(self, num_bytes: int, more_bytes: int) -> Refused | None:
        if num_bytes > self._max_body_bytes:
            return Refused(
                413, f"the body has more than {self._max_body_bytes:,} bytes; send fewer or smaller images"
            )
        if self._waiting_bytes + more_bytes > self._max_waiting_bytes:
            return Refused(503, "too many requests are waiting; send this one again later")
        return None


class _Counted:
    """The bytes that a request holds in memory."""

    num_bytes = 0


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that yields the body, and then what the client does."""
    is_read = False

    async def replay() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _answer(send: Send, refused: Refused) -> None:
    headers = [(b"content-type", b"application/json")]
    if refused.status == 503:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": refused.content})


def images_in(body: bytes, content_type: str) -> list[tuple[str | None, bytes]]:
    """Return the images of a body, each with the name of its file where the client gave one. Raises Refused."""
    kind, options = parse_options_header(content_type)
    if kind == "application/json":
        raise Refused(415, "the body is JSON, which /invocations takes; send the bytes of an image here")
    if not kind.startswith("multipart/"):
        # Whatever its type says: curl's --data-binary names a form.
        if not body:
            raise Refused(400, "the body is empty; send the bytes of an image")
        return [(None, body)]
    found = _files_of(body, kind, options)
    if not found:
        raise Refused(
            400, "the form has no files; send each image as a file, as `curl -F file=@photo.jpg` does"
        )
    if len(found) > MAX_IMAGES:
        raise Refused(413, f"the form has {len(found):,} images; send at most {MAX_IMAGES} at once")
    return found


def _files_of(body: bytes, kind: str, options: dict[str, str]) -> list[tuple[str | None, bytes]]:
    """Return the files of a form, in the order in which they were sent."""
    found: list[tuple[str | None, io.BytesIO]] = []

    def new_file(
        total_content_length: int | None,
        content_type: str | None,
        filename: str | None,
        content_length: int | None = None,
    ) -> io.BytesIO:
        found.append((filename or None, io.BytesIO()))
        return found[-1][1]

    parser = FormDataParser(new_file, max_form_parts=4 * MAX_IMAGES, silent=False)
    try:
        parser.parse(io.BytesIO(body), kind, len(body), options)
    except RequestEntityTooLarge:
        raise Refused(413, f"the form has too many parts; send at most {MAX_IMAGES} images at once") from None
    except ValueError as problem:
        raise Refused(400, f"the form cannot be read: {problem}") from None
    return [(name, file.getvalue()) for name, file in found]
