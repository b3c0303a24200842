"""A real MLflow server as a process, and a gate in front of it that may answer in its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from resnet_dist.tracking.store import STORE_FILE, URI_VARIABLE
from tests.tracking.mlflow.servers import unused_address

SOON = 120.0  # seconds; a timeout that is never reached


class Server:
    """An MLflow server that can be started and killed; its store is a file."""

    def __init__(self, folder: Path) -> None:
        self.address, self._folder = unused_address(), folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = f"sqlite:///{self._folder / STORE_FILE}"
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--backend-store-uri", store]
        command += [
            "--port",
            self.address.rpartition(":")[2],
            "--artifacts-destination",
            str(self._folder / "artifacts"),
        ]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment.pop(URI_VARIABLE, None)
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        wait_for(self._answers)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.address}/health", timeout=2).close()
        except OSError:
            return False
        return True


class Gate:
    """Passes requests on to a server, or answers itself: `answer` gets the path and returns status and body, or None."""

    def __init__(self, address: str) -> None:
        self.address = ""
        self.answer: Callable[[str], tuple[int, bytes] | None] = lambda path: None
        self._server = address

    @contextmanager
    def opened(self) -> Iterator[Gate]:
        gate = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                status, content = gate.answer(self.path) or gate._pass_on(
                    self.command, self.path, body, self.headers
                )
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_PATCH = do_PUT = do_DELETE = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def _pass_on(self, method: str, path: str, body: bytes, headers: object) -> tuple[int, bytes]:
        request = urllib.request.Request(f"{self._server}{path}", body or None, method=method)
        if kind := headers.get("Content-Type"):  # type: ignore[attr-defined]
            request.add_header("Content-Type", kind)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def wait_for(sign: Callable[[], object]) -> None:
    deadline = time.monotonic() + SOON
    while not sign():
        assert time.monotonic() < deadline
        time.sleep(0.05)
