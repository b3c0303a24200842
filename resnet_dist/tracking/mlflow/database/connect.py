"""Open a store that MLflow keeps without a server; one that is not there yet is created once, by one process."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import sqlalchemy
from mlflow.store.db import utils as mlflow_database

from resnet_dist.system.locks import hold_lock
from resnet_dist.tracking.store import sqlite_file

CREATE_SECONDS = 300  # MLflow creates its tables in seconds; many runs may begin at once on a busy machine
# The key of a lock in PostgreSQL that nothing else takes: the first bytes of "resnet_dist".
POSTGRESQL_LOCK = int.from_bytes(b"resnet_d")
# The SQLite files that this process has opened, by URI, see `identity`.
_opened: dict[str, tuple[int, int] | None] = {}


def connect(uri: str) -> mlflow.MlflowClient:
    """Return a client of the store `uri`; a database without tables gets them, once for all processes."""
    file = sqlite_file(uri)
    if file is None:
        with _lock_of_database(uri):
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


@contextmanager
def _lock_of_database(uri: str) -> Iterator[None]:
    """Keep other processes from creating the tables of a PostgreSQL database at the same moment.

    MLflow creates them, and its first experiment, with the client. Other stores are not locked: a server creates its
    tables before it answers.
    """
    if urlsplit(uri).scheme.partition("+")[0] != "postgresql":
        yield
        return
    engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
    # The end of the transaction releases the lock, also where the process or a pooler between dies.
    with engine.begin() as transaction:
        transaction.execute(sqlalchemy.text(f"set local lock_timeout = '{CREATE_SECONDS}s'"))
        transaction.execute(sqlalchemy.text(f"select pg_advisory_xact_lock({POSTGRESQL_LOCK})"))
        yield


def _forget_stores() -> None:
    """Let MLflow open its stores anew: it keeps one per URI, which would still use a file that was removed."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking._tracking_service import utils

    with suppress(AttributeError):
        for engine in SqlAlchemyStore._engine_map.values():
            engine.dispose()
        type(utils._tracking_store_registry)._get_store_with_resolved_uri.cache_clear()
