"""Refuse a database that cannot hold runs, before a run begins and anything is created."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import sqlalchemy
from mlflow.store.db import utils as mlflow_database

from resnet_dist.errors import UserError
from resnet_dist.system.limit import within
from resnet_dist.system.locks import NO_LOCKS
from resnet_dist.system.redact import redact
from resnet_dist.tracking.store import URI_VARIABLE, is_database, sqlite_file

try:
    import fcntl
except ImportError:  # Windows, whose file systems have locks
    fcntl = None  # type: ignore[assignment]

CHECK_SECONDS = 5.0  # for a database on another machine
SQLITE_HEADER = b"SQLite format 3\0"
# The package to install for a kind of database, and the driver in it, as SQLAlchemy names both modules and schemes.
DRIVERS = {
    "postgresql": ("psycopg2-binary", "psycopg2"),
    "mysql": ("pymysql", "pymysql"),
    "mssql": ("pyodbc", "pyodbc"),
}
MLFLOW_TABLES = {"experiments", "runs"}


def check_database(uri: str) -> None:
    """Raise UserError where the database `uri` cannot hold runs, and a person must act. Creates nothing.

    A database on another machine that does not answer is no mistake: the run waits for it.
    """
    if not is_database(uri):
        return
    if (file := sqlite_file(uri)) is not None:
        _check_sqlite(file)
        # A file that another process has locked is checked when it is opened.
        with suppress(sqlite3.OperationalError):
            _check_schema(_sqlite_schema(file), uri)
        return
    _check_driver(uri)
    with suppress(sqlalchemy.exc.SQLAlchemyError, TimeoutError):
        _check_schema(within(CHECK_SECONDS, lambda: _schema(uri)), uri)


def _check_sqlite(file: Path) -> None:
    """Raise UserError where SQLite cannot keep runs in `file`."""
    if file.is_dir():
        raise UserError(f"{file}: is a folder, not a SQLite database; name a file in it")
    if file.exists() and file.stat().st_size:
        with file.open("rb") as opened:
            if opened.read(len(SQLITE_HEADER)) != SQLITE_HEADER:
                raise UserError(f"{file}: is no SQLite database; move it away, or {_elsewhere()}")
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if file.exists() and not os.access(file, os.W_OK):
        raise UserError(f"{file}: is read-only, so MLflow cannot keep runs in it; {_elsewhere()}")
    try:
        has_locks = _has_locks(folder)
    except OSError as error:  # SQLite writes a journal beside the file.
        raise UserError(
            f"{file}: {folder} cannot be written to ({error.strerror}), so MLflow cannot keep runs there; {_elsewhere()}"
        ) from None
    if not has_locks:
        raise UserError(
            f"{file}: its file system has no locks, without which SQLite cannot keep runs; {_elsewhere()}"
        )


def _elsewhere() -> str:
    return f"let {URI_VARIABLE} name a server, or a file on a local disk, as in sqlite:////path/to/mlflow.db"


def _has_locks(folder: Path) -> bool:
    """Report whether SQLite can lock files in `folder`. Raises OSError where no file can be written there."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        if fcntl is None:
            return True
        try:
            fcntl.lockf(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in NO_LOCKS
    return True


def _sqlite_schema(file: Path) -> tuple[set[str], str | None]:
    """Return the tables of a SQLite file and the revision of their schema; neither for a file that is not there."""
    if not file.exists():
        return set(), None
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=2)) as database:
        tables = {name for (name,) in database.execute("select name from sqlite_master where type = 'table'")}
        rows = (
            database.execute("select version_num from alembic_version").fetchall()
            if _versioned(tables)
            else []
        )
    return tables, rows[0][0] if rows else None


def _schema(uri: str) -> tuple[set[str], str | None]:
    engine = sqlalchemy.create_engine(uri)
    try:
        tables = set(sqlalchemy.inspect(engine).get_table_names())
        return tables, mlflow_database._get_schema_version(engine) if _versioned(tables) else None
    finally:
        engine.dispose()


def _versioned(tables: set[str]) -> bool:
    return "alembic_version" in tables


def _check_schema(schema: tuple[set[str], str | None], uri: str) -> None:
    """Raise UserError where the tables are not those of the installed MLflow."""
    tables, revision = schema
    if not tables - {"alembic_version", "sqlite_sequence"}:
        return  # MLflow creates them.
    if not tables >= MLFLOW_TABLES:
        raise UserError(
            f"{redact(uri)}: holds the tables of another program; name a database of its own for MLflow"
        )
    known = _known_revisions()
    if revision == known[0]:
        return
    if revision in known or revision is None:
        raise UserError(
            f"{redact(uri)}: has the tables of an earlier MLflow than the installed {mlflow.__version__}; make a copy of "
            f"it, then upgrade it: mlflow db upgrade {redact(uri)}"
        )
    raise UserError(
        f"{redact(uri)}: has the tables of a later MLflow than the installed {mlflow.__version__}; install the version "
        "that wrote it (pip install --upgrade mlflow for the newest), or name another database"
    )


def _known_revisions() -> list[str]:
    """Return the schema revisions that the installed MLflow knows, the newest first."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(mlflow_database._get_alembic_config(db_url=""))
    return [script.revision for script in scripts.walk_revisions()]


def _check_driver(uri: str) -> None:
    """Raise UserError where the Python package that talks to the database is not installed."""
    try:
        dialect = sqlalchemy.engine.make_url(uri).get_dialect()
        dialect.import_dbapi()
    except ModuleNotFoundError as error:
        family = urlsplit(uri).scheme.partition("+")[0]
        package, driver = DRIVERS[family]
        other = (
            f"write {family}+{driver}://…"
            if find_spec(driver)
            else f"install {package} and write {family}+{driver}://…"
        )
        advice = f"install {package}" if error.name == driver else f"install it, or {other}"
        raise UserError(
            f"{redact(uri)}: the Python package {error.name} is not installed; {advice}"
        ) from None
    except sqlalchemy.exc.ArgumentError as error:
        raise UserError(f"{redact(uri)}: is no address of a database ({redact(str(error))})") from None
