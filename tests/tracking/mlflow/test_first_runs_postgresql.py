"""Several first runs create the tables of one PostgreSQL database: a lock of the database lets one of them do it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from resnet_dist.tracking.mlflow.database import connect as opening
from tests.paths import ROOT
from tests.tracking.mlflow.servers import has_postgresql, postgresql_database

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
    """Yield the address of an empty database."""
    if not has_postgresql():
        pytest.skip("needs PostgreSQL in /usr/lib/postgresql and the Python package psycopg2")
    with postgresql_database() as address:
        yield address


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
