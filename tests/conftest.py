"""Options and fixtures that several tests share: the digits data set as shards, and a small recipe on it."""

from __future__ import annotations

import importlib
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from filelock import FileLock

from resnet_dist.config import Recipe
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.runs.storage.scratch import SCRATCH_VARIABLE
from resnet_dist.tracking.store import STORE_FILE
from tests.digits import small_recipe
from tests.s3_server import S3Server, no_fault, s3_server, variables

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)
# Where bytecode is never kept, each program that a test starts compiles this package anew, for a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A worker of Ray that has not imported everything after 60 s is ended and started again, without end on a busy machine.
os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
# No test cuts the power, and waiting for a slow disk thousands of times takes minutes. tests/system/test_files.py holds that
# it is called before a file or a folder gets its name.
os.fsync = lambda descriptor: None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests that are marked long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        # The longest begin first: at the end of all, one worker would wait for the other's.
        items.sort(key=_allowed_seconds, reverse=True)
        return
    skip = pytest.mark.skip(reason="long: `pytest --all` runs it")
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker(skip)


def _allowed_seconds(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else 0.0


def pytest_configure(config: pytest.Config) -> None:
    """Bind each of xdist's workers, and the programs that its tests start, to cores of its own.

    Otherwise the programs of every worker use all cores, and threads that wait for one another spin.
    """
    worker = getattr(config, "workerinput", None)
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        number, count = int(worker["workerid"].removeprefix("gw")), int(worker["workercount"])
        os.sched_setaffinity(0, cores[number::count] or cores)


MakeOnce = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Return a function that makes a file or folder of this name, once for all workers of xdist, and returns it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, write: Callable[[Path], object]) -> Path:
        done = base / f"{name}.done"
        with FileLock(base / f"{name}.lock"):
            if not done.exists():
                write(base / name)
                done.touch()
        return base / name

    return make


@pytest.fixture(scope="session")
def digits_data(make_once: MakeOnce) -> Path:
    """Return a folder with train/ and eval/ of the digits, as `resnet-dist prepare digits` writes them."""
    return make_once("digits", lambda folder: prepare(open_source("digits"), folder))


def _create_store(file: Path) -> None:
    import sqlalchemy
    from mlflow.store.db import utils

    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    getattr(utils, "create_tables", utils._initialize_tables)(engine)
    engine.dispose()


@pytest.fixture(scope="session")
def empty_store(make_once: MakeOnce) -> Path:
    """Return the file of an MLflow store without runs; copy it."""
    return make_once(STORE_FILE, _create_store)


def _do_not_wait_for_the_disk(connection: Any, _: object) -> None:
    # What is no database is found by the statement that follows.
    with suppress(sqlite3.Error):
        if isinstance(connection, sqlite3.Connection):
            connection.execute("pragma synchronous = off")


@pytest.fixture(autouse=True)
def new_stores_are_copies(make_once: MakeOnce) -> None:
    """Let MLflow copy the tables of a new SQLite store: its migrations take seconds, and so run once for all tests.

    Programs that a test starts create their own. A test that does not import MLflow does not import it for this.
    """
    utils = sys.modules.get("mlflow.store.db.utils")
    if utils is None or hasattr(utils, "create_tables"):
        return
    import sqlalchemy

    create = utils._initialize_tables

    def copy(engine: Any) -> None:
        name = engine.url.database if engine.url.get_backend_name() == "sqlite" else None
        if name in (None, "", ":memory:") or (Path(name).exists() and Path(name).stat().st_size):
            create(engine)
        else:
            shutil.copyfile(make_once(STORE_FILE, _create_store), name)

    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", _do_not_wait_for_the_disk)
    utils.create_tables = create  # type: ignore[attr-defined]
    utils._initialize_tables = copy  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Undo what a training in this process sets: threads that wait for one another spin."""
    yield
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture
def digits_recipe(digits_data: Path) -> Recipe:
    return small_recipe(digits_data)


@pytest.fixture(scope="session")
def shared_s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(shared_s3: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3Server]:
    """Return an S3 server with the variables that name its proxy, and a scratch folder of the test's own."""
    with suppress(
        ImportError
    ):  # s3fs keeps its connections, and their address, for a process that names no other.
        s3fs = importlib.import_module("s3fs")
        s3fs.S3FileSystem.clear_instance_cache()
    for name, value in variables(shared_s3.proxy.url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path / "scratch"))
    shared_s3.proxy.seen.clear()
    yield shared_s3
    shared_s3.proxy.fault = no_fault
