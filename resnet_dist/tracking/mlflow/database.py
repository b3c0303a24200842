"""The databases that MLflow opens without a server: checked before a run begins, created once, kept where they lie."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import uuid
from contextlib import closing, suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import mlflow
import sqlalchemy
from mlflow.store.db import utils as mlflow_database

from resnet_dist.errors import UserError
from resnet_dist.system.locks import NO_LOCKS, hold_lock
from resnet_dist.system.redact import redact
from resnet_dist.tracking.limit import within
from resnet_dist.tracking.store import ARTIFACTS_FOLDER, URI_VARIABLE, is_database, sqlite_file

try:
    import fcntl
except ImportError:  # Windows, whose file systems have locks
    fcntl = None  # type: ignore[assignment]

CHECK_SECONDS = 5.0  # for a database on another machine
CREATE_SECONDS = 300.0  # MLflow creates its tables in seconds; many runs may begin at once on a busy machine
SQLITE_HEADER = b"SQLite format 3\0"
# The package to install for a kind of database, and the driver in it, as SQLAlchemy names both modules and schemes.
DRIVERS = {
    "postgresql": ("psycopg2-binary", "psycopg2"),
    "mysql": ("pymysql", "pymysql"),
    "mssql": ("pyodbc", "pyodbc"),
}
MLFLOW_TABLES = {"experiments", "runs"}
# The SQLite files that this process has opened, by URI, see `identity`.
_opened: dict[str, tuple[int, int] | None] = {}
# The columns that hold the place of artifacts as an absolute URI.
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)


def check_database(uri: str) -> None:
    """Raise UserError where the database `uri` cannot hold runs, and a person must act. Creates nothing.

    A database on another machine that does not answer is no mistake: the run waits for it.
    """
    if not is_database(uri):
        return
    if (file := sqlite_file(uri)) is not None:
        _check_sqlite(file)
        with suppress(
            sqlite3.OperationalError
        ):  # Locked by another process: it is checked when it is opened.
            _check_schema(_sqlite_schema(file), uri)
        return
    _check_driver(uri)
    with suppress(sqlalchemy.exc.SQLAlchemyError, TimeoutError):
        _check_schema(within(CHECK_SECONDS, lambda: _schema(uri)), uri)


def connect(uri: str) -> mlflow.MlflowClient:
    """Return a client of the store `uri`; a SQLite store is created where there is none, once for all processes."""
    file = sqlite_file(uri)
    if file is None:
        return mlflow.MlflowClient(uri, uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(file.with_name(f".{file.name}.lock"), CREATE_SECONDS):
        if not file.exists() or not file.stat().st_size:
            _create(file)
        if _opened.setdefault(uri, identity(uri)) != identity(uri):
            _forget_stores()
            _opened[uri] = identity(uri)
        return mlflow.MlflowClient(uri, uri)


def identity(uri: str) -> tuple[int, int] | None:
    """Return what identifies the file of a SQLite store; None for another store, and where the file is gone.

    A connection to a file that was removed or replaced writes to nowhere, without an error.
    """
    file = sqlite_file(uri)
    if file is None or not file.exists():
        return None
    return file.stat().st_dev, file.stat().st_ino


def relocate(uri: str, output: Path) -> None:
    """Let the embedded store name the artifacts where they are, after its output folder was moved or renamed.

    MLflow keeps absolute places. They stay where the folder that they name is the same one, seen from elsewhere.
    """
    file = sqlite_file(uri)
    if os.environ.get(URI_VARIABLE) or file is None or not file.exists():
        return
    here = (output.absolute() / ARTIFACTS_FOLDER).as_uri()
    with closing(sqlite3.connect(file, timeout=20)) as database, database:
        rows = database.execute("select distinct artifact_location from experiments").fetchall()
        for before in {_artifacts_of(location or "") for (location,) in rows} - {None, here}:
            assert before is not None
            if _is_still_there(Path(unquote(urlsplit(before).path)), file):
                continue
            for table, column in LOCATIONS:
                with suppress(sqlite3.OperationalError):  # An earlier version of MLflow has no such column.
                    database.execute(
                        f"update {table} set {column} = ? || substr({column}, ?) where substr({column}, 1, ?) = ?",
                        (here, len(before) + 1, len(before) + 1, f"{before}/"),
                    )


def _is_still_there(artifacts: Path, file: Path) -> bool:
    """Report whether `artifacts` are those of the store in `file`: not gone, and not those of another store."""
    other = artifacts.with_name(file.name)
    if other.exists() and not other.samefile(
        file
    ):  # `file` is a copy, or a new store has taken its old place.
        return not file.with_name(artifacts.name).exists()
    return artifacts.exists()


def _artifacts_of(location: str) -> str | None:
    """Return the URI of the artifacts folder that an experiment's location is in; None where it has another form."""
    folder, separator, _ = location.rpartition(f"/{ARTIFACTS_FOLDER}/")
    return f"{folder}/{ARTIFACTS_FOLDER}" if separator and location.startswith("file://") else None


def _create(file: Path) -> None:
    """Create the tables in a file beside `file` and rename it: a store is whole or does not exist."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}.partial")
    engine = sqlalchemy.create_engine(f"sqlite:///{partial}")
    try:
        mlflow_database._initialize_tables(engine)
        engine.dispose()
        partial.replace(file)
    finally:
        engine.dispose()
        partial.unlink(missing_ok=True)


def _forget_stores() -> None:
    """Let MLflow open its stores anew: it keeps one per URI, which would still use a file that was removed."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service import utils

    with suppress(AttributeError):
        for engine in SqlAlchemyStore._engine_map.values():
            engine.dispose()
        type(utils._tracking_store_registry)._get_store_with_resolved_uri.cache_clear()


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
