"""Servers that stand where an MLflow server is expected, and answer as it does not."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LOGIN_PAGE = b"<!doctype html><html><body>Please log in</body></html>"


@contextmanager
def answering(status: int, body: bytes = b"{}", kind: str = "text/html") -> Iterator[str]:
    """Yield the address of a server that answers every request with `status` and `body`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with _serving(Handler) as address:
        yield address


@contextmanager
def silent() -> Iterator[str]:
    """Yield the address of a server that takes every request and does not answer before the block ends."""
    end = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            end.wait()

    with _serving(Handler) as address:
        try:
            yield address
        finally:
            end.set()


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def unused_address() -> str:
    """Return an address where nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_port}"
