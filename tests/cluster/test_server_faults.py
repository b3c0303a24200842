"""Servers that go away, are slow, answer with errors, are full or send damaged shards, in the middle of a run on two hosts.

What time cures costs the run nothing: it ends as the undisturbed one, with each metric once. What a person must mend ends it
with one sentence.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.conftest import FLAGS, data_at
from tests.cluster.fault_table import FaultTable
from tests.cluster.hosts import needs_hosts
from tests.cluster.results import Result, journal, longest_pause
from tests.cluster.scene import Scene
from tests.cluster.services import MLFLOW_PORT, S3_PORT, WEB_PORT
from tests.s3_server import FaultyStore, no_fault

pytestmark = [needs_hosts, pytest.mark.long, pytest.mark.timeout(1200)]
SECONDS = 600.0  # limit for each wait
SHORT = ["--workers=2", "--set=model.name=resnet8", "--set=train.length=12 steps"]


@dataclass(frozen=True)
class Servers:
    """The proxies before the servers of the scene, which break on command."""

    web: FaultyStore
    mlflow: FaultyStore
    s3: FaultyStore

    def submit(self, scene: Scene, name: str) -> subprocess.Popen[str]:
        words = [*FLAGS, *data_at(self.web.url), "--env", f"AWS_ENDPOINT_URL={self.s3.url}"]
        return scene.submit(
            name, *words, log=f"{name}.txt", variables={"MLFLOW_TRACKING_URI": self.mlflow.url}
        )


@pytest.fixture
def servers(whole_scene: Scene) -> Iterator[Servers]:
    scene = whole_scene
    with (
        closing(proxy(scene, scene.shards, WEB_PORT)) as web,
        closing(proxy(scene, scene.mlflow, MLFLOW_PORT)) as mlflow,
        closing(proxy(scene, scene.client.environment["AWS_ENDPOINT_URL"], S3_PORT)) as s3,
    ):
        yield Servers(web, mlflow, s3)


def proxy(scene: Scene, address: str, port: int) -> FaultyStore:
    host = address.removeprefix("http://").partition(":")[0]
    return FaultyStore(port, host=host, bind=scene.gateway)


@contextmanager
def away_at_the_first_shard(web: FaultyStore, seconds: float) -> Iterator[None]:
    """Take the server away when a shard is asked for: index and host are known by then. Later it is slow, and damages one."""
    asked, damaged = threading.Event(), threading.Event()

    def first(method: str, path: str) -> str | None:
        if path.endswith(".tar"):
            asked.set()
            return "cut answer"
        return None

    def then(method: str, path: str) -> str | None:
        if not path.endswith(".tar") or damaged.is_set():
            return "slow" if path.endswith(".tar") else None
        damaged.set()
        return "damage answer"

    def take_away() -> None:
        if asked.wait(SECONDS):
            with web.away():
                time.sleep(seconds)
                web.fault = then

    web.fault = first
    thread = threading.Thread(target=take_away)
    thread.start()
    try:
        yield
    finally:
        asked.set()
        thread.join()


def finish(
    scene: Scene,
    name: str,
    process: subprocess.Popen[str],
    undisturbed: Result,
    table: FaultTable,
    fault: str,
) -> str:
    """Wait for the end of a run, compare it with the undisturbed one, and return its output."""
    code = process.wait(SECONDS)
    output = scene.client.output(f"{name}.txt")
    table.keep(f"{name}.txt", output)
    assert code == 0, output[-3000:]
    run = scene.run(name)
    result, pause = Result.of(scene.mlflow, run), longest_pause(journal(run))
    row = table.add(fault, run, result, undisturbed, next_step_seconds=pause, exit_codes=[code])
    assert "Traceback" not in output
    assert (row.status, row.attempts, row.lost, row.doubled, row.difference) == ("FINISHED", 1, 0, 0, 0.0)
    assert result.weights == undisturbed.weights
    return output


def test_shards_and_tracker_that_are_away_for_a_while(
    whole_scene: Scene, servers: Servers, undisturbed: Result, table: FaultTable
) -> None:
    scene, name = whole_scene, "away"
    scene.prepare(scene.nodes)
    log = f"{name}.txt"
    with away_at_the_first_shard(servers.web, 30.0):
        process = servers.submit(scene, name)
        scene.client.wait_for("\nrun away: ", SECONDS, log=log)
        began = time.monotonic()
        with servers.mlflow.away():
            scene.client.wait_for("training does not wait", SECONDS, log=log)
            # A minute in all; on a fast machine the steps that are left take less.
            time.sleep(max(15.0, 60.0 - (time.monotonic() - began)))
    fault = "shards away for 30 s at the start, then slow (2 s each), one damaged on the way; MLflow away for 60 s"
    output = finish(scene, name, process, undisturbed, table, fault)
    assert "the tracker answers again" in output
    assert servers.web.seen["damage answer"] == 1
    assert servers.web.seen["slow"] > 0


def test_a_slow_tracker_and_a_full_store(
    whole_scene: Scene, servers: Servers, undisturbed: Result, table: FaultTable
) -> None:
    scene, name = whole_scene, "slow"
    scene.prepare(scene.nodes)
    servers.mlflow.fault = lambda method, path: "slow"
    process = servers.submit(scene, name)
    wait = scene.client.wait_for
    wait("\nstep 40/", SECONDS, log=f"{name}.txt")
    servers.mlflow.fault = lambda method, path: "500"
    wait("\nstep 80/", SECONDS, log=f"{name}.txt")
    servers.mlflow.fault = no_fault
    # As a store answers that has no room left; whoever frees some takes a while.
    servers.s3.fault = lambda method, path: "507" if method == "PUT" else None
    time.sleep(20)
    servers.s3.fault = no_fault
    fault = "MLflow slow (2 s a request) and then answering 500; the store full for 20 s"
    finish(scene, name, process, undisturbed, table, fault)
    assert servers.mlflow.seen["slow"] > 0
    assert servers.mlflow.seen["500"] > 0
    assert servers.s3.seen["507"] > 0


def damaged_shard(scene: Scene, servers: Servers) -> tuple[list[str], str, int]:
    name = "000003.tar"
    servers.web.fault = lambda method, path: "damage answer" if path.endswith(name) else None
    return data_at(servers.web.url), f"{name}: has sha256:", 1


def data_of_one_node(scene: Scene, servers: Servers) -> tuple[list[str], str, int]:
    for host in (scene.cluster.head, scene.nodes[0], scene.client):
        if not (host.folder / "own").exists():
            subprocess.run(["cp", "-r", str(shards_of(scene)), str(host.folder / "own")], check=True)
    return data_at("/tmp/own"), " on h2: /tmp/own/train/index.json: no such index", 1


def unknown_name(scene: Scene, servers: Servers) -> tuple[list[str], str, int]:
    return data_at("http://shards.invalid"), "unknown host shards.invalid", 2


def shards_of(scene: Scene) -> Path:
    (web,) = scene.client.folder.parent.glob("web/files")
    return web


MISTAKES: list[Callable[[Scene, Servers], tuple[list[str], str, int]]] = [
    damaged_shard,
    data_of_one_node,
    unknown_name,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_what_a_person_must_mend_ends_the_run_with_one_sentence(
    whole_scene: Scene, servers: Servers, mistake: Callable[[Scene, Servers], tuple[list[str], str, int]]
) -> None:
    scene, name = whole_scene, mistake.__name__
    scene.prepare(scene.nodes)
    words, sentence, code = mistake(scene, servers)
    log = f"{name}.txt"
    process = scene.submit(name, *SHORT, *words, log=log)
    assert process.wait(SECONDS) == code, scene.client.output(log)[-3000:]
    output = scene.client.output(log)
    assert sentence in output
    assert "Traceback" not in output
    assert output.count("error: ") == 1, output
    assert "resumes from step" not in output  # It is not tried again.


OTHER_TORCH = "Metadata-Version: 2.1\nName: torch\nVersion: 2.0.0\n"


@pytest.mark.parametrize("package", ["resnet_dist", "torch"])
def test_a_node_with_other_packages_is_refused_at_the_start(whole_scene: Scene, package: str) -> None:
    scene = whole_scene
    host = scene.nodes[1]
    other = host.folder / "other"
    if package == "torch":
        (other / "torch-2.0.0.dist-info").mkdir(parents=True)
        (other / "torch-2.0.0.dist-info/METADATA").write_text(OTHER_TORCH)
        sentence = "the nodes of the cluster have different versions of torch (2.0.0 on h2 "
    else:
        (other / "resnet_dist").mkdir(parents=True)
        (other / "resnet_dist/__init__.py").write_text('__version__ = "0.1.0"\n')
        sentence = f"the cluster's node h2 ({host.address}) has resnet_dist 0.1.0, this process has "
    scene.prepare(scene.nodes[:1])
    before = host.environment["PYTHONPATH"]
    host.environment["PYTHONPATH"] = f"/tmp/other:{before}"
    try:
        scene.cluster.join(host)
        scene.cluster.wait_for_nodes(*scene.nodes)
        log = f"other-{package}.txt"
        process = scene.submit(f"other-{package}", *SHORT, *data_at(scene.shards), log=log)
        assert process.wait(SECONDS) == 2, scene.client.output(log)[-3000:]
        assert sentence in scene.client.output(log)
        assert "Traceback" not in scene.client.output(log)
    finally:
        host.environment["PYTHONPATH"] = before
        subprocess.run(["rm", "-r", str(other)], check=True)
        host.crash()
        scene.cluster.wait_for_nodes(scene.nodes[0])
