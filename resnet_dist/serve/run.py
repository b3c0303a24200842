"""Start a server on a port that is free, report its address when it answers, and end it with Ctrl-C."""

from __future__ import annotations

import http.client
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import uvicorn
from uvicorn.supervisors import Multiprocess

from resnet_dist.errors import UserError
from resnet_dist.serve.app import Settings, make_app, work_of
from resnet_dist.system.cpus import cpu_count
from resnet_dist.tracking.mlflow.logged.scoring import write_scored
from resnet_dist.train.checkpoint.load import TrainedModel

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 5001
ANY_HOST = ("0.0.0.0", "::")
# For requests under way; less than the time that an interrupted command has.
STOP_SECONDS = 3
POLL_SECONDS = 0.1  # between two looks whether the server answers

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
    with tempfile.TemporaryDirectory(prefix="resnet-dist-serve-") as folder, _announced(port, report):
        model = Path(folder) / "model"
        write_scored(model, trained)
        settings = Settings(model, name, work_of(trained), top_k, cpus, gpu)
        if workers == 1:
            _serve_here(settings, port)
        else:
            _serve_in_processes(settings, port, workers)


def _serve_here(settings: Settings, port: socket.socket) -> None:
    config = uvicorn.Config(
        make_app(settings), log_config=None, access_log=False, timeout_graceful_shutdown=STOP_SECONDS
    )
    # uvicorn ends the requests under way, and then sends this process the signal again.
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([port])


def _serve_in_processes(settings: Settings, port: socket.socket, workers: int) -> None:
    """Serve by several processes, each with the model; one that dies is started again."""
    config = uvicorn.Config(
        partial(make_app, settings),  # type: ignore[arg-type]
        factory=True,
        log_config=None,
        access_log=False,
        workers=workers,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    with _own_signals():
        Multiprocess(config, [port]).run()


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
