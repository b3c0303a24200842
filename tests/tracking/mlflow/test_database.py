"""Databases: what cannot hold runs is refused before a run begins, and a moved store finds its artifacts."""

from __future__ import annotations

import errno
import fcntl
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import AbstractContextManager, closing
from pathlib import Path

import mlflow
import pytest

from resnet_dist.errors import UserError
from resnet_dist.tracking.mlflow.database import check
from resnet_dist.tracking.mlflow.database import connect as opening
from resnet_dist.tracking.mlflow.database.check import check_database
from resnet_dist.tracking.mlflow.database.connect import connect
from resnet_dist.tracking.mlflow.database.relocate import relocate
from resnet_dist.tracking.store import STORE_FILE, tracking_uri
from tests.paths import ROOT


def refusal(uri: str) -> str:
    with pytest.raises(UserError) as refused:
        check_database(uri)
    assert "hush" not in str(refused.value)
    return str(refused.value)


def set_schema(output: Path, revision: str) -> None:
    with closing(sqlite3.connect(output / STORE_FILE)) as store, store:
        store.execute("update alembic_version set version_num = ?", (revision,))


def test_a_fresh_place_is_accepted_and_nothing_is_made_there(tmp_path: Path) -> None:
    check_database(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_accepted(output: Path) -> None:
    check_database(tracking_uri(output))


def test_an_older_schema_names_the_command(output: Path) -> None:
    set_schema(output, check._known_revisions()[3])
    uri = tracking_uri(output)
    assert refusal(uri).endswith(f"make a copy of it, then upgrade it: mlflow db upgrade {uri}")


def test_a_newer_schema_names_the_installed_version(output: Path) -> None:
    set_schema(output, "fffffffffff0")
    assert f"a later MLflow than the installed {mlflow.__version__}" in refusal(tracking_uri(output))


def test_what_is_no_store_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.db").write_text("twenty words that are no database")
    assert "is no SQLite database" in refusal(f"sqlite:///{tmp_path}/text.db")
    assert "is a folder" in refusal(f"sqlite:///{tmp_path}")
    assert "cannot be written to (Not a directory)" in refusal(f"sqlite:///{tmp_path}/text.db/mlflow.db")
    with closing(sqlite3.connect(tmp_path / "other.db")) as other, other:
        other.execute("create table studies (id integer)")
    assert "the tables of another program" in refusal(f"sqlite:///{tmp_path}/other.db")
    monkeypatch.setattr(check.os, "access", lambda path, mode: False)  # root may write everywhere
    assert "is read-only" in refusal(f"sqlite:///{tmp_path}/other.db")


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_refused(
    output: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def lockf(*arguments: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert "its file system has no locks" in refusal(tracking_uri(output))


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("postgresql+nodriver://anna:hush@host/db", "is no address of a database"),
        ("mysql://anna:hush@host/db", "the Python package MySQLdb is not installed"),
        ("mssql+pyodbc://anna:hush@host/db", "the Python package pyodbc is not installed; install pyodbc"),
    ],
)
def test_a_missing_driver_is_named(uri: str, advice: str) -> None:
    assert advice in refusal(uri)


def test_a_postgresql_driver_that_is_missing_names_the_one_that_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.setattr(check, "find_spec", lambda name: name == "psycopg2")
    assert "psycopg is not installed; install it, or write postgresql+psycopg2://…" in refusal(
        "postgresql://anna:hush@host/db"
    )


def test_a_database_that_does_not_answer_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(uri: str) -> None:
        raise check.sqlalchemy.exc.OperationalError("select", {}, Exception("no route to host"))

    monkeypatch.setattr(check, "_check_driver", lambda uri: None)
    monkeypatch.setattr(check, "_schema", away)
    check_database("postgresql+psycopg2://host/db")


def test_a_store_that_is_half_created_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(engine: object) -> None:
        with closing(sqlite3.connect(str(engine.url.database))) as store, store:  # type: ignore[attr-defined]
            store.execute("create table experiments (id integer)")
        raise KeyboardInterrupt

    monkeypatch.setattr(opening.mlflow_database, "_initialize_tables", die)
    with pytest.raises(KeyboardInterrupt):
        connect(f"sqlite:///{tmp_path}/mlflow.db")
    assert [path.name for path in tmp_path.iterdir()] == [".mlflow.db.lock"]


FIRST_RUN = """
import sys
from pathlib import Path
from resnet_dist.tracking.mlflow.database.connect import connect
from resnet_dist.tracking.mlflow.run import _experiment
output = Path(sys.argv[1])
uri = f"sqlite:///{output}/mlflow.db"
sys.stdin.readline()  # All begin at the same moment.
client = connect(uri)
experiment = _experiment(client, "digits", output, uri)
print(client.create_run(experiment).info.experiment_id)
"""


def first_runs(output: Path, count: int) -> list[str]:
    """Let `count` processes create the store and its experiment at the same moment; return their experiments."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", FIRST_RUN, str(output)]
    runs = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(count)]
    for run in runs:
        assert run.stdin is not None
        run.stdin.write("\n")
        run.stdin.flush()
    return [run.communicate(timeout=250)[0].strip() for run in runs]


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 8])
def test_first_runs_create_one_store(tmp_path: Path, count: int) -> None:
    assert first_runs(tmp_path, count) == ["1"] * count


def test_a_store_is_created_under_a_lock(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, created = threading.Event(), []

    def create(file: Path) -> None:
        begun.set()
        # The other thread has asked for the lock by then, and waits for it.
        assert asks.acquire(timeout=60)
        created.append(shutil.copy(empty_store, file))

    asks = threading.Semaphore(0)
    hold = opening.hold_lock

    def ask(path: Path, seconds: float) -> AbstractContextManager[None]:
        if begun.is_set():
            asks.release()
        return hold(path, seconds)

    monkeypatch.setattr(opening, "_create", create)
    monkeypatch.setattr(opening, "hold_lock", ask)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first = threading.Thread(target=connect, args=(uri,), daemon=True)
    first.start()
    assert begun.wait(60)
    assert connect(uri).search_experiments()[0].name == "Default"
    first.join(60)
    assert len(created) == 1


def locations(output: Path) -> set[str]:
    with closing(sqlite3.connect(output / STORE_FILE)) as store:
        return {
            row[0]
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri"))
            for row in store.execute(f"select {column} from {table}")
            if "digits" in row[0]
        }


@pytest.mark.parametrize("is_copied", [False, True])
def test_the_artifacts_of_a_moved_store_are_found(output: Path, is_copied: bool) -> None:
    client = connect(tracking_uri(output))
    experiment = client.create_experiment("digits", artifact_location=(output / "artifacts/digits").as_uri())
    run = client.create_run(experiment).info.run_id
    client.log_text(run, "hello", "note.txt")
    relocate(tracking_uri(output), output)
    before = locations(output)
    same = output.parent / "same"
    same.symlink_to(output)
    relocate(tracking_uri(same), same)
    assert locations(output) == before
    moved = output.parent / "mo ved"
    if is_copied:  # The first folder stays, with a store of its own, as after a new run at the old place.
        shutil.copytree(output, moved)
    else:
        output.rename(moved)
    relocate(tracking_uri(moved), moved)
    assert all(location.startswith(f"{moved.as_uri()}/artifacts/digits") for location in locations(moved))
    assert len(locations(moved)) == 2
    again = mlflow.MlflowClient(tracking_uri(moved))
    assert Path(again.download_artifacts(run, "note.txt")).read_text() == "hello"
