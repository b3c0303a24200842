"""A bucket on this machine for benchmarks: it answers GET and HEAD as S3 does, from the files of a folder.

    python -m tests.benchmarks.bucket_server FOLDER [--megabytes-per-second N] [--latency-ms N]

It runs in a process of its own and prints its address. `sendfile` leaves its CPU to the kernel: moto's server would take
more of the two cores than what is measured. The limit holds for all connections together, as that of a network does;
the latency is that of each request, before its first byte. It checks no signature.
"""

from __future__ import annotations

import argparse
import os
import re
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

LOCALHOST = "127.0.0.1"
BLOCK_BYTES = 128 * 1024  # sent at a time, and paid for at a time


class Line:
    """A network line of so many bytes a second, which all connections share; None: without a limit."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._rate, self._lock, self._free_at = bytes_per_second, threading.Lock(), 0.0

    def take(self, num_bytes: int) -> None:
        """Wait as long as the bytes take."""
        if self._rate is None:
            return
        with self._lock:
            begin = max(self._free_at, time.monotonic() - BLOCK_BYTES / self._rate)
            self._free_at = begin + num_bytes / self._rate
            end = self._free_at
        time.sleep(max(0.0, end - time.monotonic()))


def handler_of(folder: Path, line: Line, latency_seconds: float) -> type[BaseHTTPRequestHandler]:
    """Return the handler of requests for /BUCKET/KEY, a file below `folder`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            time.sleep(latency_seconds)
            path = folder / unquote(self.path.partition("?")[0]).lstrip("/")
            if not path.is_file():
                self.fail()
                return
            status = path.stat()
            asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            end = (
                min(int(asked[2] or status.st_size - 1), status.st_size - 1) + 1 if asked else status.st_size
            )
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{status.st_size}")
            self.send_header("Content-Length", str(end - start))
            self.send_header("Content-Type", "application/x-tar")
            self.send_header("ETag", f'"{status.st_mtime_ns:x}"')
            self.send_header("Last-Modified", formatdate(status.st_mtime, usegmt=True))
            self.end_headers()
            if body:
                self.send_file(path, start, end)

        def send_file(self, path: Path, start: int, end: int) -> None:
            with path.open("rb") as file:
                while start < end:
                    count = min(BLOCK_BYTES, end - start)
                    line.take(count)
                    start += os.sendfile(self.connection.fileno(), file.fileno(), start, count)

        def fail(self) -> None:
            content = b"<Error><Code>NoSuchKey</Code><Message>There is no such key.</Message></Error>"
            self.send_response(404)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that has gone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes-per-second", type=float)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    chosen = parser.parse_args()
    rate = chosen.megabytes_per_second
    line = Line(None if rate is None else rate * 1e6)
    server = _Server((LOCALHOST, 0), handler_of(chosen.folder.resolve(), line, chosen.latency_ms / 1000))
    print(f"http://{LOCALHOST}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
