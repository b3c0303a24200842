"""Start a server on a port that is free, report its address when it answers, and end it with Ctrl-C."""

from __future__ import annotations

import http.client
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from resnet_dist.data.findings import one_line
from resnet_dist.errors import ExplainedError, UserError
from resnet_dist.serve.app import Settings, make_app, work_of
from resnet_dist.serve.body import Application
from resnet_dist.system.cpus import cpu_count
from resnet_dist.system.locks import LockHeld, hold_lock
from resnet_dist.tracking.mlflow.logged.scoring import write_scored
from resnet_dist.train.checkpoint.load import TrainedModel

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 5001
ANY_HOST = ("0.0.0.0", "::")
# For requests under way; less than the time that an interrupted command has.
STOP_SECONDS = 3
START_SECONDS = 300  # limit for a process that imports and loads the model
POLL_SECONDS = 0.1  # between two looks whether the server answers
FOLDER_PREFIX, LOCK_FILE = "resnet-dist-serve-", ".lock"
FRESH_SECONDS = 60.0  # the age of a folder whose server may just be starting, without its lock

Report = Callable[[str], None]


def open_port(host: str, port: int | None, report: Report) -> socket.socket:
    """Return a socket at the port that was asked for, else at the usual one, else at a free one.

    Raises UserError where the host is none of this machine, or the port is in use.
    """
    try:
        return _bound(host, DEFAULT_PORT if port is None else port)
    except socket.gaierror as error:
        raise UserError(f"--host {host}: has no address ({error.strerror}); use {DEFAULT_HOST}") from None
    except OSError as error:
        if port is not None:
            raise UserError(
                f"--port {port}: cannot be used on {host} ({error.strerror}); use another one"
            ) from None
    try:
        found = _bound(host, 0)
    except OSError as error:
        raise UserError(
            f"--host {host}: is no address of this machine ({error.strerror}); use {DEFAULT_HOST}"
        ) from None
    report(f"port {DEFAULT_PORT} is in use: another one is taken")
    return found


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        # Listen at once: two servers can be bound to one port, but not listen there.
        found.listen(socket.SOMAXCONN)
    except OSError:
        found.close()
        raise
    return found


def serve(
    trained: TrainedModel,
    name: str,
    port: socket.socket,
    report: Report,
    *,
    top_k: int,
    workers: int,
    gpu: bool,
) -> None:
    """Serve a model at a port until an interruption. name: of the model, for the page.

    report: called with the address when the server answers.
    """
    cpus = max(1, cpu_count() // workers)
    with own_folder() as folder, _announced(port, report):
        model = folder / "model"
        write_scored(model, trained)
        settings = Settings(model, name, work_of(trained), top_k, cpus, gpu)
        if workers == 1:
            _serve_here(settings, port)
        else:
            _serve_in_processes(settings, port, workers)


@contextmanager
def own_folder() -> Iterator[Path]:
    """Yield a new folder that ends with the block; remove those of servers that were killed.

    A server holds the lock of its folder, which the kernel releases when it dies.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
        with suppress(OSError, LockHeld):  # It is another user's, or its server lives.
            if time.time() - left.stat().st_mtime > FRESH_SECONDS:
                with hold_lock(left / LOCK_FILE, 0):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX) as name:
        folder = Path(name)
        with hold_lock(folder / LOCK_FILE, 0):
            yield folder


def _serve_here(settings: Settings, port: socket.socket) -> None:
    config = uvicorn.Config(
        make_app(settings), log_config=None, access_log=False, timeout_graceful_shutdown=STOP_SECONDS
    )
    # uvicorn ends the requests under way, and then sends this process the signal again.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([port])


def _serve_in_processes(settings: Settings, port: socket.socket, workers: int) -> None:
    """Serve by several processes, each with the model; one that dies is started again.

    Raises ExplainedError where one could not load the model: it would fail again.
    """
    config = uvicorn.Config(
        partial(worker_app, settings),  # type: ignore[arg-type]
        factory=True,
        log_config=None,
        access_log=False,
        workers=workers,
        # By default a process that imports for more than 5 s, from a slow disk, is ended and begun again.
        timeout_worker_healthcheck=START_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    with _own_signals():
        supervisor = Supervisor(config, [port])
        supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        raise ExplainedError("the server has ended: a process of it could not load the model, see above")


class Supervisor(Multiprocess):
    """Starts the processes. A hangup ends it, unless it was started to ignore that, as nohup does."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        self._ignores_hangup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        super().__init__(config, sockets)

    def handle_hup(self) -> None:
        if not self._ignores_hangup:
            self.handle_term()


def worker_app(settings: Settings) -> Application:
    """Return the application of a process that ends with its parent; a failure is one sentence, and ends all."""
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    try:
        return make_app(settings)
    except Exception as error:  # The loading of a model may raise any type.
        kind = "" if isinstance(error, ExplainedError) else f"{type(error).__name__}: "
        print(f"error: the model cannot be loaded: {kind}{one_line(str(error))}", file=sys.stderr)
        raise SystemExit(STARTUP_FAILURE) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restore the handlers of signals at the end of the block, which uvicorn replaces."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


@contextmanager
def _announced(port: socket.socket, report: Report) -> Iterator[None]:
    """Report the address once a server answers there, from a thread that ends with the block."""
    host, number = port.getsockname()[:2]
    is_any = host in ANY_HOST
    shown = socket.gethostname() if is_any else f"[{host}]" if ":" in host else host
    ended = threading.Event()

    def announce() -> None:
        while not ended.wait(POLL_SECONDS):
            if _answers("localhost" if is_any else host, number):
                report(
                    f"open   http://{shown}:{number}/\npost   http://{shown}:{number}/predict\nCtrl-C ends it"
                )
                return

    thread = threading.Thread(target=announce, name="announce", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _answers(host: str, port: int) -> bool:
    # Not urllib, which would ask a proxy that a variable names.
    connection = http.client.HTTPConnection(host, port, timeout=2)
    try:
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
