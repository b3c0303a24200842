"""Several first runs create the tables of one PostgreSQL database: a lock of the database lets one of them do it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.tracking.mlflow.database import connect as opening
from tests.launch.ray_cluster.servers import free_port
from tests.paths import ROOT

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))

FIRST_RUN = """
import sys
from resnet_dist.tracking.mlflow.database.connect import connect
sys.stdin.readline()  # All begin at the same moment.
client = connect(sys.argv[1])
print(client.create_run("0").info.status)
"""


class FakeEngine:
    """An engine that records its statements, and the begin and end of its transaction."""

    def __init__(self, events: list[str]) -> None:
        self.events = events

    @contextmanager
    def begin(self) -> Iterator[Any]:
        self.events.append("begin")
        yield self
        self.events.append("end")

    def execute(self, statement: object) -> None:
        self.events.append(str(statement))


def test_a_client_of_postgresql_is_made_under_its_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(opening.sqlalchemy, "create_engine", lambda uri, **options: FakeEngine(events))
    monkeypatch.setattr(opening.mlflow, "MlflowClient", lambda *uris: events.append("client"))
    for uri in ("postgresql://host/db", "postgresql+psycopg2://host/db"):
        opening.connect(uri)
        begin, limit, lock, client, end = events
        assert (begin, client, end) == ("begin", "client", "end")
        assert (limit, lock.split("(")[0]) == (
            "set local lock_timeout = '300s'",
            "select pg_advisory_xact_lock",
        )
        events.clear()
    opening.connect("http://host")
    assert events == ["client"]


@pytest.fixture
def postgresql() -> Iterator[str]:
    """Yield the address of an empty database, on a server that is started for it and runs as another user than root."""
    if not PROGRAMS or find_spec("psycopg2") is None:
        pytest.skip("needs PostgreSQL in /usr/lib/postgresql and the Python package psycopg2")
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
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        call("pg_ctl", "stop", "--wait", "-m", "immediate", "-D", data)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.long
def test_first_runs_create_one_store(postgresql: str) -> None:
    command = [sys.executable, "-c", FIRST_RUN, postgresql]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    runs = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(4)]
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
    ended = [run.communicate(timeout=280) for run in runs]
    results = [out.strip() for out, _ in ended]
    assert results == ["RUNNING"] * 4, ended
