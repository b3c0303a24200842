"""Serve the embedded MLflow store to a browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlflow

from resnet_dist.errors import UserError
from resnet_dist.search_path import SAFE_PATH_VARIABLE
from resnet_dist.system.signals import EXIT_SECONDS
from resnet_dist.tracking.mlflow.run import page_of
from resnet_dist.tracking.store import STORE_FILE, URI_VARIABLE, tracking_uri

# Between SIGTERM and SIGKILL; less than the time that an interrupted command has.
STOP_SECONDS = EXIT_SECONDS - 1.0


def serve_store(output: Path, port: int, report: Callable[[str], None]) -> int:
    """Run `mlflow server` on the store of `output` until it is interrupted; return its exit code.

    report: called once, with the address to open. Raises UserError where there is nothing to serve or the
    port is in use.
    """
    if os.environ.get(URI_VARIABLE):
        raise UserError(
            f"{URI_VARIABLE}={os.environ[URI_VARIABLE]}: the runs are there; open it in a browser"
        )
    if not (output / STORE_FILE).exists():
        raise UserError(f"{output / STORE_FILE}: no runs yet; `resnet-dist train` makes it")
    _check_port(port)
    uri = tracking_uri(output)
    # Open the experiment of the newest run: somebody who has just trained wants to see that one.
    experiments = mlflow.MlflowClient(uri).search_experiments(order_by=["last_update_time DESC"])
    named = [experiment for experiment in experiments if experiment.name != "Default"]
    address = f"http://127.0.0.1:{port}"
    report(f"open {page_of(address, named[0].experiment_id) if named else address}   (Ctrl-C ends it)")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--port", str(port)]
    # Job execution would start eight more processes, which a page of metrics does not need.
    environment = {**os.environ, SAFE_PATH_VARIABLE: "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # In a group of its own the server gets no signal from the terminal: we end it and its workers ourselves.
    with subprocess.Popen(command, env=environment, start_new_session=True) as server:
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            _end_group(server)


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # The server sets it too.
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"--port {port}: cannot be used ({error.strerror}); use another one") from None


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the server and the processes that it started, and SIGKILL to those that remain.

    Another Ctrl-C ends the wait between the two.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            server.wait(STOP_SECONDS)
