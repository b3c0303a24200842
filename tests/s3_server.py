"""An S3 server for the tests, and a proxy before it that refuses, breaks and slows down requests on purpose."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.data.servers import LOCALHOST, ThreadedServer, free_port, wait_for_port

# Given method and path of a request: None, a status such as "500", "refuse" (503), "slow", "cut request", "cut answer",
# "lose answer", "damage answer", "ignore conditions", or the code of an error of S3, which is answered with 403.
Fault = Callable[[str, str], str | None]
CUTS = ("cut request", "cut answer", "lose answer")
OWN_FAULTS = (None, "slow", *CUTS, "damage answer", "ignore conditions")
SLOW_SECONDS = 2.0  # for each request


def no_fault(method: str, path: str) -> str | None:
    return None


class FaultyStore(ThreadedServer):
    """A proxy before a server on `host`. `fault` may be replaced at any time; `seen` counts faults.

    bytes_per_second: limit for the bodies of requests, over all connections. bind: the address at which it listens.
    """

    def __init__(
        self,
        port: int,
        bytes_per_second: float | None = None,
        *,
        host: str = LOCALHOST,
        bind: str = LOCALHOST,
    ) -> None:
        self.fault: Fault = no_fault
        self.seen: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self._lock, self._free_at = threading.Lock(), 0.0
        self._upstream, self._is_away = host, False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_request(self) -> None:
                with contextlib.suppress(OSError):
                    outer._serve(self, port, bytes_per_second)

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = do_HEAD = handle_request

            def log_message(self, *arguments: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a connection that the client or a fault has cut

        self._listen = lambda port: Server((bind, port), Handler)
        self._begin(self._listen(0))
        self.url = f"http://{bind}:{self.port}"

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Refuse connections inside the block, and cut those that are open."""
        self._is_away = True
        self.close()
        try:
            yield
        finally:
            self._is_away = False
            self._begin(self._listen(self.port))

    def wait_for(self, num_bytes: int, bytes_per_second: float) -> None:
        """Wait as long as the bytes take on the one line that all connections share."""
        with self._lock:
            begin = max(self._free_at, time.monotonic())
            self._free_at = begin + num_bytes / bytes_per_second
            end = self._free_at
        time.sleep(max(0.0, end - time.monotonic()))

    def _serve(self, handler: BaseHTTPRequestHandler, port: int, bytes_per_second: float | None) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        self.requests[handler.command] += 1
        fault = self.fault(handler.command, handler.path)
        if fault is not None:
            self.seen[fault] += 1
        if self._is_away:
            _cut(handler)
            return
        body = handler.rfile.read(length // 2 if fault == "cut request" else length)
        if fault == "slow":
            time.sleep(SLOW_SECONDS)
        if bytes_per_second is not None:
            self.wait_for(len(body), bytes_per_second)
        if fault == "cut request":
            _cut(handler)
            return
        if fault == "refuse" or (fault or "").isdecimal():
            handler.send_response(503 if fault == "refuse" else int(fault or ""))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault not in OWN_FAULTS:
            content = f"<Error><Code>{fault}</Code><Message>of {fault}</Message></Error>".encode()
            handler.send_response(403)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content)
            return
        headers = dict(handler.headers)
        if fault == "ignore conditions":
            headers = {name: value for name, value in headers.items() if not name.lower().startswith("if-")}
        upstream = http.client.HTTPConnection(self._upstream, port, timeout=60)
        upstream.request(handler.command, handler.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fault == "damage answer" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault == "lose answer":
            _cut(handler)
            return
        handler.send_response(answer.status)
        size = str(len(content))
        for name, value in answer.getheaders():
            if name.lower() == "content-length" and handler.command == "HEAD":
                size = value
            elif name.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", size)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(content[: len(content) // 2] if fault == "cut answer" else content)
        if fault == "cut answer":
            _cut(handler)


def _cut(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    with contextlib.suppress(OSError):
        handler.connection.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class S3Server:
    """A server with empty buckets, and a proxy before it."""

    port: int
    proxy: FaultyStore

    def new_bucket(self) -> str:
        """Make a bucket and return its name."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        connection = http.client.HTTPConnection(LOCALHOST, self.port, timeout=60)
        connection.request("PUT", f"/{name}")
        assert connection.getresponse().status == 200
        connection.close()
        return name


def variables(url: str) -> dict[str, str]:
    """Return the environment of a process that uses the server at `url`."""
    return {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "hush-hush",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }


@contextlib.contextmanager
def s3_server(bytes_per_second: float | None = None) -> Iterator[S3Server]:
    """Run moto's server in a process of its own, and a proxy before it. Skips where they are not installed."""
    pytest.importorskip("moto.server", reason="needs moto[server]")
    pytest.importorskip("obstore", reason="needs obstore")
    port = free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", LOCALHOST, "-p", str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        wait_for_port(port, 120)
        proxy = FaultyStore(port, bytes_per_second)
        try:
            yield S3Server(port, proxy)
        finally:
            proxy.close()
    finally:
        process.terminate()
        process.wait(30)
