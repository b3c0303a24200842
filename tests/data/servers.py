"""Servers for the tests: files over HTTP with ranges, and a proxy that breaks transfers on purpose."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

LOCALHOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCALHOST, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, seconds: float = 30.0) -> None:
    """Wait until something listens on the port. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection((LOCALHOST, port), timeout=1):
            return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port} after {seconds} s")


def nginx_configuration(files: Path, folder: Path, address: str) -> str:
    """Return the configuration of an nginx that serves `files` at `address`, and writes into `folder` alone."""
    user = "user root;" if os.getuid() == 0 else ""
    places = " ".join(
        f"{name}_temp_path {folder}/t;" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return (
        f"daemon off; {user} pid {folder}/nginx.pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; {places}\nserver {{ listen {address}; root {files}; }} }}\n"
    )


class ThreadedServer:
    """A server that answers in a thread of this process."""

    def _begin(self, server: ThreadingHTTPServer) -> None:
        self._server, self.port = server, server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class FileServer(ThreadedServer):
    """The files of a folder over HTTP. `requests` and `sent` count GET requests and bytes by file name."""

    def __init__(self, folder: Path, *, ranges: bool = True) -> None:
        self.requests: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # with it, every answer of two writes would wait 40 ms

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    self.send_error(404)
                    return
                content = path.read_bytes()
                total, requested = len(content), re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if requested and ranges:
                    start, end = int(requested[1]), int(requested[2] or total - 1)
                    content = content[start : end + 1]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{start + len(content) - 1}/{total}")
                else:
                    self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                if ranges:
                    self.send_header("Accept-Ranges", "bytes")
                self.end_headers()
                if body:
                    outer.requests[path.name] += 1
                    outer.sent[path.name] += len(content)
                    self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self._begin(ThreadingHTTPServer((LOCALHOST, 0), Handler))
        self.url = f"http://{LOCALHOST}:{self.port}"


class FaultyProxy:
    """A proxy that forwards HTTP to `port`, one request per connection, and applies `fault(n)` to the n-th request.

    None: forward the answer. "500": answer with that status. "reset", "truncate", "stall": after half of the answer,
    reset the connection, close it, or keep it open without another byte.
    """

    def __init__(self, port: int, fault: Callable[[int], str | None]) -> None:
        self._upstream, self._fault, self._count = port, fault, 0
        self.faults: Counter[str | None] = Counter()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._listener = socket.create_server((LOCALHOST, 0))
        self._listener.settimeout(0.1)
        self.url = f"http://{LOCALHOST}:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._closing.set()
        for thread in list(self._threads):
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(TimeoutError):
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(20)
            request = _until_blank_line(client)
            if not request:
                return
            with self._lock:
                fault = self._fault(self._count)
                self._count += 1
                self.faults[fault] += 1
            if fault == "500":
                client.sendall(b"HTTP/1.1 500 Broken\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            with socket.create_connection((LOCALHOST, self._upstream), timeout=20) as upstream:
                closing = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", request)
                upstream.sendall(closing[:-4] + b"\r\nConnection: close\r\n\r\n")
                answer = b"".join(iter(lambda: upstream.recv(65536), b""))
            head, _, body = answer.partition(b"\r\n\r\n")
            answer = head + b"\r\nConnection: close\r\n\r\n" + body
            client.sendall(answer if fault is None else answer[: len(answer) - len(body) // 2 - 1])
            if fault == "reset":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if fault == "stall":
                client.settimeout(0.1)
                while not self._closing.is_set():
                    with contextlib.suppress(TimeoutError):
                        if not client.recv(1):  # closed by the client
                            return


def _until_blank_line(client: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        block = client.recv(4096)
        if not block:
            return b""
        received += block
    return received


@contextlib.contextmanager
def file_server(folder: Path, *, ranges: bool = True) -> Iterator[FileServer]:
    server = FileServer(folder, ranges=ranges)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def faulty_proxy(port: int, fault: Callable[[int], str | None]) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(port, fault)
    try:
        yield proxy
    finally:
        proxy.close()
