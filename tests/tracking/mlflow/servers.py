"""MLflow servers that are started and killed, and servers that stand where one is expected and answer as it does not."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from resnet_dist.tracking.store import URI_VARIABLE
from tests.launch.ray_cluster.servers import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
SOON = 120.0  # seconds; a timeout that is never reached

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


class MlflowServer:
    """An MLflow server on a store, which can be started and killed again and again at one address."""

    def __init__(self, folder: Path, store: str) -> None:
        self.address = unused_address()
        self._folder, self._store = folder, store
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--workers",
            "1",
            "--backend-store-uri",
            self._store,
        ]
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

        with _serving(Handler) as self.address:
            yield self

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


def has_postgresql() -> bool:
    return bool(PROGRAMS) and find_spec("psycopg2") is not None


@contextmanager
def postgresql_database() -> Iterator[str]:
    """Yield the address of an empty database, on a server that is started for it and runs as another user than root."""
    user = pwd.getpwnam("nobody") if os.getuid() == 0 else pwd.getpwuid(os.getuid())
    # The path of the socket must be short.
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    shutil.chown(folder, user.pw_uid)
    as_user: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if os.getuid() == 0:
        as_user |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data, port = str(folder / "data"), free_port()

    def call(*command: str) -> None:
        subprocess.run([str(PROGRAMS[-1] / command[0]), *command[1:]], check=True, timeout=120, **as_user)

    try:
        call("initdb", "--auth=trust", "--username=mlflow", "--no-sync", "-D", data)
        options = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -F"
        call("pg_ctl", "start", "--wait", "-D", data, "-o", options)
        try:
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "stop", "--wait", "-m", "immediate", "-D", data)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
