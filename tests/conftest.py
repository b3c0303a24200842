"""Options and fixtures that several tests share: the digits data set as shards, and a small recipe on it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import pytest
import torch

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.runs.storage.scratch import SCRATCH_VARIABLE
from tests.paths import ROOT
from tests.s3_server import S3Server, no_fault, s3_server, variables

hypothesis.settings.register_profile("default", deadline=None, max_examples=60)
hypothesis.settings.load_profile("default")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the tests that are marked long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all"):
        skip = pytest.mark.skip(reason="long: `pytest --all` runs it")
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    """Bind each of xdist's workers, and the programs that its tests start, to cores of its own.

    Otherwise the programs of every worker use all cores, and threads that wait for one another spin.
    """
    worker = getattr(config, "workerinput", None)
    if worker is not None and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        number, count = int(worker["workerid"].removeprefix("gw")), int(worker["workercount"])
        os.sched_setaffinity(0, cores[number::count] or cores)


@pytest.fixture(scope="session")
def digits_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with train/ and eval/ of the digits, as `resnet-dist prepare digits` writes them."""
    folder = tmp_path_factory.mktemp("digits")
    prepare(open_source("digits"), folder)
    return folder


@pytest.fixture
def digits_recipe(digits_data: Path) -> Recipe:
    """Return the recipe of jobs/digits.py, with a network and a length that suit a test."""
    overrides = [
        f"data.train={digits_data}/train",
        f"data.eval={digits_data}/eval",
        "model.name=resnet8",
        "train.length=24 steps",
        "train.log_every=5 steps",
        "train.eval_every=12 steps",
        "train.checkpoint_every=8 steps",
        # Drawing takes seconds; the tests of figures ask for them.
        "train.figures=none",
    ]
    return load_recipe(ROOT / "jobs/digits.py", overrides)


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
