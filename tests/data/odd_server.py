"""A web server that behaves as real ones do: the first part of a path says how, the rest names a file of the folder."""

from __future__ import annotations

import base64
import contextlib
import gzip
import re
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from tests.data.servers import LOCALHOST, ThreadedServer

SIGNATURE = "X-Amz-Credential=AKIA%2Fs3%2Faws4_request&Signature=a%2Bb%2Fc%3D%7E"
NUM_FAILURES = 2  # the failures of each file in the modes `flaky-STATUS`


class OddServer(ThreadedServer):
    """The server. `log` has a line METHOD PATH for every request, `headers` the newest headers."""

    def __init__(self, folder: Path) -> None:
        self.log: list[str] = []
        self.headers: dict[str, str] = {}
        self.seen: Counter[str] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def fail(self, status: int, body: bytes = b"no", **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def answer(self) -> None:
                path = self.path.removeprefix(outer.url)  # as a proxy, it gets the whole URL
                outer.log.append(f"{self.command} {self.path}")
                outer.headers = dict(self.headers)
                path, _, query = path.partition("?")
                mode, _, name = path.lstrip("/").partition("/")
                outer.seen[f"{mode}/{name}"] += 1
                if refused := self.refusal(mode, query, outer.seen[f"{mode}/{name}"]):
                    self.fail(*refused[:2], **(refused[2] if len(refused) > 2 else {}))
                    return
                file = folder / unquote(name)
                if not file.is_file():
                    self.fail(404)
                elif mode == "redirect":
                    self.fail(302, b"", Location=f"http://localhost:{outer.port}/signed/{name}?{SIGNATURE}")
                else:
                    self.send_file(mode, file.read_bytes())

            def refusal(self, mode: str, query: str, count: int) -> tuple | None:  # type: ignore[type-arg]
                kind, _, status = mode.partition("-")
                basic = "Basic " + base64.b64encode(b"user:p@ss/word").decode()
                if kind == "flaky" and count <= NUM_FAILURES:
                    return int(status), b"busy", {"Retry_After": "0"}
                if kind == "later" and count == 1:
                    return 503, b"busy", {"Retry_After": "1"}
                if kind == "head" and self.command == "HEAD":
                    return int(status), b""
                if kind == "signed" and query != SIGNATURE:
                    return 403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>"
                if kind == "basic" and self.headers.get("Authorization") != basic:
                    return 401, b"no"
                if kind == "header" and self.headers.get("X-Team") != "blue":
                    return 401, b"no"
                if kind == "status":
                    return int(status), b"no"
                if kind == "page":
                    return 200, b"<!DOCTYPE html><html><title>Sign in</title></html>"
                if kind == "python" and "ython" in self.headers.get("User-Agent", ""):
                    return 403, b"no"
                return None

            def send_file(self, mode: str, content: bytes) -> None:
                accepted = "gzip" in self.headers.get("Accept-Encoding", "")
                zipped = mode == "gzipalways" or (mode == "gzip" and accepted)
                labelled = mode == "gziplabel"
                total = len(content)
                asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                has_ranges = mode not in ("norange", "chunked", "chunkedgzip") and not zipped
                if zipped:
                    content = gzip.compress(content)
                if asked and has_ranges:
                    start, end = int(asked[1]), int(asked[2] or total - 1)
                    if mode != "wrongrange":
                        content = content[start : end + 1]
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{end}/{total}")
                else:
                    self.send_response(200)
                if zipped or labelled:
                    self.send_header("Content-Encoding", "gzip")
                if mode == "chunked":
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    for at in range(0, total, 5000) if self.command == "GET" else ():
                        block = content[at : at + 5000]
                        self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))
                    if self.command == "GET":
                        self.wfile.write(b"0\r\n\r\n")
                    return
                is_zero = mode == "headzero" and self.command == "HEAD"
                self.send_header("Content-Length", "0" if is_zero else str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    with contextlib.suppress(OSError):  # the client needed the headers alone
                        self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that has gone

        server = Server((LOCALHOST, 0), Handler)
        server.daemon_threads = True
        self._begin(server)
        self.url = f"http://{LOCALHOST}:{self.port}"


@contextlib.contextmanager
def odd_server(folder: Path) -> Iterator[OddServer]:
    server = OddServer(folder)
    try:
        yield server
    finally:
        server.close()
