"""Find out what answers at a host and port, within seconds and by plain sockets.

Ray's own clients wait for minutes where something else answers, and print lines of C++ while they wait.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any
from urllib.parse import unquote

from resnet_dist.launch.ray_cluster.address import Address
from resnet_dist.system.limit import within

# The limits together stay below the ten seconds that a person waits for a sentence.
NAME_SECONDS = 2.5
CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 2.5
MAX_ANSWER_BYTES = 64 * 1024
VERSION_PATH = "/api/version"
# A frame of HTTP/2: three bytes of length, its type (4: SETTINGS, which a server sends first), flags, and stream 0.
_HTTP2_TYPE, _HTTP2_STREAM = 3, slice(5, 9)


class Kind(Enum):
    """Kinds of what is found at an address."""

    UNKNOWN_HOST = auto()
    NOT_LISTENING = auto()
    NO_ANSWER = auto()  # packets are swallowed
    SILENT = auto()  # a connection, but not a byte
    DASHBOARD = auto()
    LOCKED_DASHBOARD = auto()  # it asks for a token, or for another one
    HTTP = auto()  # a web server that is no dashboard of Ray
    TLS = auto()  # it expects a TLS handshake
    NO_TLS = auto()  # it does not understand one
    HTTP2 = auto()  # as gRPC: Ray's GCS, its client server, or something else
    OTHER = auto()


@dataclass(frozen=True)
class Answer:
    """The answer of what listens at an address; `detail` is for a message."""

    kind: Kind
    detail: str = ""
    ray_version: str = ""  # the version that a dashboard names
    session: str = ""  # the name of a dashboard's cluster, which its GCS has too


class _End(Exception):
    """The probe has found out as much as it can."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.answer = Answer(kind, detail)


def probe(address: Address, headers: Mapping[str, str] | None = None) -> Answer:
    """Return what answers at `address`. headers: of the HTTP request, such as a token."""
    try:
        return _identify(_exchange(address, headers or {}))
    except _End as end:
        return end.answer


def _exchange(address: Address, headers: Mapping[str, str]) -> bytes:
    """Send an HTTP request and return the first bytes of the answer."""
    with _connect(_resolve(address.host, address.port)) as connection:
        try:
            if address.scheme == "https":
                connection = _start_tls(connection, address.host)
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(_request(address, headers))
            data = _receive(connection)
        except TimeoutError:
            data = b""
        except OSError as error:  # What listens has closed the connection at once.
            raise _End(Kind.SILENT, f"it closes the connection ({error.strerror or error})") from None
        # A server of gRPC over TLS closes the connection of a client that begins without it.
        if not data and address.scheme != "https" and _is_closed(connection) and _answers_tls(address):
            raise _End(Kind.TLS, "it closes a connection without TLS")
        if not data:
            raise _End(Kind.SILENT, "it accepts a connection but sends nothing")
        return data


def _is_closed(connection: socket.socket) -> bool:
    """Report whether the other side has closed the connection."""
    connection.setblocking(False)
    try:
        return not connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:  # It was reset.
        return True


def _answers_tls(address: Address) -> bool:
    """Report whether a new connection to `address` can be one of TLS."""
    try:
        with _connect(_resolve(address.host, address.port)) as connection:
            _start_tls(connection, address.host).close()
    except (_End, OSError):
        return False
    return True


def _resolve(host: str, port: int) -> list[Any]:
    """Return the addresses of `host`, as socket.getaddrinfo() does, which knows no limit of time."""
    try:
        return within(NAME_SECONDS, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except TimeoutError:
        raise _End(Kind.UNKNOWN_HOST, f"no name server has answered in {NAME_SECONDS:g} s") from None
    except (OSError, UnicodeError) as error:
        raise _End(Kind.UNKNOWN_HOST, str(getattr(error, "strerror", None) or error)) from None


def _connect(found: list[Any]) -> socket.socket:
    """Return a connection to the first of the addresses that accepts one."""
    deadline = time.monotonic() + CONNECT_SECONDS
    kind, detail = Kind.NO_ANSWER, ""
    for number, (family, form, protocol, _, target) in enumerate(found):
        seconds = (deadline - time.monotonic()) / (len(found) - number)
        connection = socket.socket(family, form, protocol)
        try:
            connection.settimeout(max(seconds, 0.1))
            connection.connect(target)
        except TimeoutError:
            connection.close()
        except OSError as error:
            connection.close()
            kind, detail = Kind.NOT_LISTENING, error.strerror or str(error)
        else:
            return connection
    raise _End(kind, detail or f"no answer in {CONNECT_SECONDS:g} s")


def _start_tls(connection: socket.socket, host: str) -> socket.socket:
    # Only find out what answers: the client that is used afterwards checks the certificate.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection.settimeout(ANSWER_SECONDS)
    try:
        return context.wrap_socket(connection, server_hostname=host)
    except ssl.SSLError as error:
        raise _End(Kind.NO_TLS, error.reason or str(error)) from None


def _request(address: Address, headers: Mapping[str, str]) -> bytes:
    lines = {"Host": address.target, "Connection": "close", "Accept": "application/json", **headers}
    if address.user_info:
        secret = base64.b64encode(unquote(address.user_info.rstrip("@")).encode()).decode()
        lines.setdefault("Authorization", f"Basic {secret}")
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"GET {address.path}{VERSION_PATH} HTTP/1.1\r\n{text}\r\n".encode()


def _receive(connection: socket.socket) -> bytes:
    """Return what comes within ANSWER_SECONDS, until the connection ends or the answer is complete."""
    deadline, data = time.monotonic() + ANSWER_SECONDS, b""
    while len(data) < MAX_ANSWER_BYTES and not _is_http2(data):
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            break
        connection.settimeout(seconds)
        try:
            more = connection.recv(MAX_ANSWER_BYTES)
        except OSError:  # A timeout, or a reset: what has come until then shows what it is.
            break
        if not more:
            break
        data += more
        if not data.startswith(b"HTTP/"[: len(data)]) and not data.startswith(b"\0"):
            break  # A greeting: nothing more is expected.
    return data


def _is_http2(data: bytes) -> bool:
    return len(data) >= 9 and data[_HTTP2_TYPE] == 4 and data[_HTTP2_STREAM] == bytes(4)


def _identify(data: bytes) -> Answer:
    """Return what sends `data` as the answer to an HTTP request."""
    if _is_http2(data):
        return Answer(Kind.HTTP2)
    if data.startswith(b"\x15\x03"):  # an alert of TLS
        return Answer(Kind.TLS)
    if not data.startswith(b"HTTP/"):
        words = data.split(b"\n")[0][:40].decode("ascii", "replace").strip()
        name = "an SSH server" if data.startswith(b"SSH-") else "something that is no Ray cluster"
        return Answer(Kind.OTHER, f"{name} ({''.join(c if c.isprintable() else '?' for c in words)!r})")
    return _identify_http(data)


class _Received:
    """The bytes of an answer in the form that http.client reads: of a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _identify_http(data: bytes) -> Answer:
    try:
        response = http.client.HTTPResponse(_Received(data))  # type: ignore[arg-type]
        response.begin()
        body = response.read().decode(errors="replace")
    except (http.client.HTTPException, ValueError) as error:
        return Answer(Kind.HTTP, f"a web server with a damaged answer ({type(error).__name__})")
    if response.status in (401, 403) and "authentication token" in body:  # in Ray's words
        return Answer(Kind.LOCKED_DASHBOARD)
    if response.status == 400 and "HTTPS" in body:
        return Answer(Kind.TLS)
    if location := response.headers.get("Location") if 300 <= response.status < 400 else None:
        return Answer(Kind.HTTP, f"a web server that redirects to {location}")
    try:
        value = json.loads(body) if response.status == 200 else {}
        return Answer(Kind.DASHBOARD, "", value["ray_version"], str(value.get("session_name", "")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Answer(Kind.HTTP, f"a web server that is no Ray dashboard (status {response.status})")
