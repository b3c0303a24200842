"""The scene, the undisturbed run of the faults and their table, which take long: once for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fault_table import FaultTable
from tests.cluster.hosts import why_not
from tests.cluster.results import Result
from tests.cluster.scene import Scene, scene
from tests.cluster.services import require_servers

SECONDS = 600.0  # limit for the undisturbed run
# The net is deep enough for all of it to happen while it trains, on a fast machine too.
FLAGS = [
    "--workers=1:2",
    "--set=model.name=resnet56",
    "--set=train.length=200 steps",
    "--set=train.eval_every=100 steps",
    "--set=train.checkpoint_every=10 steps",
    "--set=train.log_every=1 steps",
]


@pytest.fixture(scope="session")
def shared_scene(digits_data: Path) -> Iterator[Scene]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    require_servers()
    with scene(digits_data) as made:
        yield made


@pytest.fixture
def whole_scene(shared_scene: Scene) -> Iterator[Scene]:
    """Yield the scene that all tests of a session share; each leaves its servers, its head and nothing else alive."""
    yield shared_scene
    assert shared_scene.is_whole()


@pytest.fixture(scope="session")
def data_flags(shared_scene: Scene) -> list[str]:
    return data_at(shared_scene.shards)


def data_at(address: str) -> list[str]:
    """Return the flags of shards at an address or in a folder."""
    return [f"--set=data.{part}={address}/{part}" for part in ("train", "eval")]


@pytest.fixture(scope="session")
def undisturbed(shared_scene: Scene, data_flags: list[str]) -> Result:
    scene, log = shared_scene, "undisturbed.txt"
    scene.prepare(scene.nodes)
    process = scene.submit("undisturbed", *FLAGS, *data_flags, log=log)
    assert process.wait(SECONDS) == 0, scene.client.output(log)[-3000:]
    return Result.of(scene.mlflow, scene.run("undisturbed"))


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> FaultTable:
    return FaultTable(request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled)
