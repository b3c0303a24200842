"""Serve an MLflow store that needs a server, the embedded one or a database, to a browser."""

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
from resnet_dist.tracking.mlflow.database.check import check_database
from resnet_dist.tracking.mlflow.database.relocate import relocate
from resnet_dist.tracking.mlflow.run import page_of
from resnet_dist.tracking.store import URI_VARIABLE, is_database, sqlite_file, tracking_uri, without_password

# Between SIGTERM and SIGKILL; less than the time that an interrupted command has.
STOP_SECONDS = EXIT_SECONDS - 1.0


def serve_store(output: Path, port: int, report: Callable[[str], None]) -> int:
    """Run `mlflow server` on the store of `output`, or the database that the environment names, until it is interrupted; return its exit code.

    report: called once, with the address to open. Raises UserError where there is nothing to serve or the
    port is in use.
    """
    uri = tracking_uri(output)
    if not is_database(uri):
        raise UserError(
            f"the runs are at {without_password(uri)}, as {URI_VARIABLE} says; open that in a browser"
        )
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise UserError(f"{file}: no runs yet; `resnet-dist train` makes it")
    check_database(uri)
    _check_port(port)
    relocate(uri, output)
    # Open the experiment of the newest run: somebody who has just trained wants to see that one.
    experiments = mlflow.MlflowClient(uri).search_experiments(order_by=["last_update_time DESC"])
    named = [experiment for experiment in experiments if experiment.name != "Default"]
    address = f"http://127.0.0.1:{port}"
    report(f"open {page_of(address, named[0].experiment_id) if named else address}   (Ctrl-C ends it)")
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port)]
    # In a variable: everybody on this machine can read a command, which would show the password of a database.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    # Job execution would start eight more processes, which a page of metrics does not need.
    environment |= {SAFE_PATH_VARIABLE: "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
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
