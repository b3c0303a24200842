"""Serve an MLflow store that needs a server, the embedded one or a database, to a browser; link to one that has its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import entry_points

from resnet_dist.errors import UserError
from resnet_dist.search_path import SAFE_PATH_VARIABLE
from resnet_dist.system.signals import EXIT_SECONDS
from resnet_dist.tracking.logged_run import LoggedRun
from resnet_dist.tracking.mlflow.browse.app import APP_NAME
from resnet_dist.tracking.mlflow.browse.links import experiment_link, run_link
from resnet_dist.tracking.mlflow.browse.view import GROUPS, NESTED, VIEW, save_views
from resnet_dist.tracking.mlflow.reading import NEWEST_FIRST, Tracker
from resnet_dist.tracking.store import is_database, sqlite_file, without_password

DEFAULT_PORT = 5000
# Between SIGTERM and SIGKILL; less than the time that an interrupted command has.
STOP_SECONDS = EXIT_SECONDS - 1.0
POLL_SECONDS = 0.2  # between two looks whether the server answers
# A person's page needs no more; each process takes seconds of a small machine to start.
NUM_WORKERS = 2
MAX_WARM_RUNS, WARM_SECONDS = 10, 30.0
MAX_VIEWS = 10  # experiments that get the view at a start
MAX_RUNS = 200  # of an experiment, which are looked at for the fields that differ

Report = Callable[[str], None]
# Not urlopen, which asks a proxy for 127.0.0.1 too where http_proxy is set and no_proxy is not.
_here = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def show_runs(tracker: Tracker, port: int | None, run: str | None, report: Report) -> int:
    """Serve a store until an interruption, and return an exit code; of a tracker with a server, report its pages.

    run: the one to link, in place of the experiment of the newest run. report: called with each line for the person.
    Raises UserError where there is nothing to show, or the port is in use.
    """
    found = tracker.find(run) if run is not None else None
    view = _save_views(tracker, found.experiment if found else None)
    if not is_database(tracker.uri):
        for line in _links(without_password(tracker.uri), view, found):
            report(line)
        return 0
    chosen = _usable_port(port, report)
    links = _links(f"http://127.0.0.1:{chosen}", view, found)

    def on_ready() -> None:
        _warm_up(chosen, view[0])
        report("\n".join((*links, "Ctrl-C ends it")))

    return _serve(tracker.uri, chosen, on_ready)


def _save_views(tracker: Tracker, experiment: str | None) -> tuple[str, tuple[str, ...]]:
    """Save the views of an experiment; return the id of the experiment to open, and the keys of its views.

    In a file, the other experiments get theirs too; on a server they may be other people's. A store that takes no tags
    from this person is shown without a view.
    """
    opened = tracker.experiment(experiment)
    others = [one for one in tracker.experiments() if one.experiment_id != opened.experiment_id]
    if sqlite_file(tracker.uri) is None:
        others = []
    keys: tuple[str, ...] = ()
    for one in (*others[: MAX_VIEWS - 1], opened):
        runs = tracker.runs([one], limit=MAX_RUNS, order=NEWEST_FIRST)
        keys = ()
        with suppress(Exception):  # A server may refuse in any way; its own view serves too.
            keys = save_views(tracker.client, one.experiment_id, runs) if runs else ()
    return opened.experiment_id, keys


def _links(address: str, views: tuple[str, tuple[str, ...]], run: LoggedRun | None) -> list[str]:
    """Return the lines with the pages to open: that of the run alone, where one is named."""
    if run is not None:
        return [f"open {run_link(address, run.experiment_id, run.run_id)}"]
    experiment, keys = views
    view = VIEW if VIEW in keys else None
    groups = [
        f"{name:6} {experiment_link(address, experiment, key)}"
        for name, key in (("groups", GROUPS), ("nested", NESTED))
        if key in keys
    ]
    return [
        f"open   {experiment_link(address, experiment, view)}",
        f"charts {experiment_link(address, experiment, view, charts=True)}",
        *groups,
    ]


def _usable_port(port: int | None, report: Report) -> int:
    """Return the port that was asked for, else the usual one, else a free one. Raises UserError where it is in use."""
    try:
        return _bound(DEFAULT_PORT if port is None else port)
    except OSError as error:
        if port is not None:
            raise UserError(f"--port {port}: cannot be used ({error.strerror}); use another one") from None
        report(f"port {DEFAULT_PORT} is in use: another one is taken")
        return _bound(0)


def _bound(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # The server sets it too.
        probe.bind(("127.0.0.1", port))
        return int(probe.getsockname()[1])


def _serve(uri: str, port: int, on_ready: Callable[[], object]) -> int:
    """Run `mlflow server` until it is interrupted; return its exit code. on_ready: called when it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", str(NUM_WORKERS)]
    # An old installation of this package does not name it.
    if APP_NAME in entry_points(group="mlflow.app").names:
        command += ["--app-name", APP_NAME]
    # In a variable: everybody on this machine can read a command, which would show the password of a database.
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    # Job execution would start eight more processes, which a page of metrics does not need.
    environment |= {SAFE_PATH_VARIABLE: "1", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    # In a group of its own the server gets no signal from the terminal: we end it and its workers ourselves.
    with subprocess.Popen(command, env=environment, start_new_session=True) as server:
        try:
            while server.poll() is None and not _answers(port):
                time.sleep(POLL_SECONDS)
            if server.poll() is None:
                on_ready()
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            _end_group(server)


def _answers(port: int) -> bool:
    try:
        _here.open(f"http://127.0.0.1:{port}/health", timeout=2).close()
    except OSError:
        return False
    return True


def _warm_up(port: int, experiment_id: str) -> None:
    """Request what the page will, from all workers: each opens the store at its first request, which takes a second."""
    query = {"experiment_ids": [experiment_id], "max_results": MAX_WARM_RUNS}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/ajax-api/2.0/mlflow/runs/search",
        json.dumps(query).encode(),
        {"Content-Type": "application/json"},
    )

    def ask(_: int) -> None:
        with suppress(OSError):  # The page will be slower, no more.
            _here.open(request, timeout=WARM_SECONDS).close()

    pool = ThreadPoolExecutor(2 * NUM_WORKERS)
    try:
        # Whichever worker is free takes a request.
        list(pool.map(ask, range(2 * NUM_WORKERS)))
    finally:
        # Ctrl-C must not wait for a store that does not answer: the server ends next, and the requests with it.
        pool.shutdown(wait=False, cancel_futures=True)


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the server and the processes that it started, and SIGKILL to those that remain.

    Another Ctrl-C ends the wait between the two.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            server.wait(STOP_SECONDS)
