"""Each fault of a machine in the middle of a run: nobody helps, and the run ends with the metrics of an undisturbed one."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.fault_table import FaultTable, Row
from tests.cluster.hosts import needs_hosts
from tests.cluster.ray_hosts import GCS, RANK, RAYLET
from tests.cluster.results import Result, journal, next_step_time
from tests.cluster.scene import Scene

pytestmark = [needs_hosts, pytest.mark.long, pytest.mark.timeout(1200)]
SECONDS = 600.0  # limit for each wait
STRIKE_STEP = 25
DRIVER = "-m resnet_dist train"  # in the command line of the driver of a submitted job
# The net is deep enough for all of it to happen while it trains, on a fast machine too.
FLAGS = [
    "--workers=1:2",
    "--set=model.name=resnet56",
    "--set=train.length=200 steps",
    "--set=train.eval_every=100 steps",
    "--set=train.checkpoint_every=10 steps",
    "--set=train.log_every=1 steps",
]


@dataclass(frozen=True)
class Fault:
    """A fault; strike: called with the scene and the name of the run that trains."""

    name: str
    strike: Callable[[Scene, str], None]
    num_nodes: int = 2  # at the start of the run
    ends_driver: bool = False  # A person submits again.
    # The number of ranks changes: sums over them may differ in their last bits.
    resizes: bool = False


def kill_rank(scene: Scene, run: str) -> None:
    scene.host_of_rank(run, 1).kill(RANK)


def kill_raylet(scene: Scene, run: str) -> None:
    scene.host_of_rank(run, 1).kill(RAYLET)


def crash_node(scene: Scene, run: str) -> None:
    scene.host_of_rank(run, 0).crash()


def cut_link_for_5_seconds(scene: Scene, run: str) -> None:
    host = scene.host_of_rank(run, 1)
    host.set_link(up=False)
    time.sleep(5)
    host.set_link(up=True)


def cut_link(scene: Scene, run: str) -> None:
    """Cut off rank 0, which writes the journal and the checkpoints."""
    scene.host_of_rank(run, 0).set_link(up=False)


def add_node(scene: Scene, run: str) -> None:
    scene.cluster.join(scene.nodes[1])


def drain_node(scene: Scene, run: str) -> None:
    scene.cluster.drain(scene.host_of_rank(run, 1), seconds=60)


def kill_driver(scene: Scene, run: str) -> None:
    scene.cluster.head.kill(DRIVER)


def kill_gcs(scene: Scene, run: str) -> None:
    scene.cluster.head.kill(GCS)


FAULTS = [
    Fault("kill -9 of a rank", kill_rank),
    Fault("kill -9 of a raylet", kill_raylet, resizes=True),
    Fault("kill -9 of all processes of the node of rank 0", crash_node, resizes=True),
    Fault("link of a node cut for 5 s", cut_link_for_5_seconds),
    Fault("link of the node of rank 0 cut for good", cut_link, resizes=True),
    Fault("a node added", add_node, num_nodes=1, resizes=True),
    Fault("a node drained", drain_node, resizes=True),
    Fault("kill -9 of the driver", kill_driver, ends_driver=True),
    Fault("kill -9 of the GCS", kill_gcs, ends_driver=True),
]


@pytest.fixture(scope="module")
def flags(whole_scene: Scene) -> list[str]:
    data = [f"--set=data.{part}={whole_scene.shards}/{part}" for part in ("train", "eval")]
    return [*FLAGS, *data]


@pytest.fixture(scope="module")
def undisturbed(whole_scene: Scene, flags: list[str]) -> Result:
    scene, log = whole_scene, "undisturbed.txt"
    scene.prepare(scene.nodes)
    process = scene.submit("undisturbed", *flags, log=log)
    assert process.wait(SECONDS) == 0, scene.client.output(log)[-3000:]
    return Result.of(scene.mlflow, scene.run("undisturbed"))


@pytest.fixture(scope="module")
def table() -> FaultTable:
    return FaultTable()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_run_survives(
    whole_scene: Scene,
    undisturbed: Result,
    flags: list[str],
    table: FaultTable,
    fault: Fault,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scene, name = whole_scene, f"fault-{FAULTS.index(fault) + 1}"
    log = f"{name}.txt"
    scene.prepare(scene.nodes[: fault.num_nodes])
    process = scene.submit(name, *flags, log=log)
    scene.client.wait_for(f"\nstep {STRIKE_STEP}/", SECONDS, log=log)
    ranks, struck = scene.rank_processes(), time.time()
    fault.strike(scene, name)
    code, gone = wait_for_end(process, ranks)
    codes = [code]
    if fault.ends_driver:
        codes.append(submit_again(scene, name, flags, ranks))
    result = Result.of(scene.mlflow, scene.run(name))
    row = Row(
        fault.name,
        next_step_time(journal(scene.run(name)), struck) - struck,
        None if gone is None else gone - struck,
        ", then ".join(map(str, codes)),
        result.status,
        scene.run(name).attempt,
        result.num_lost(undisturbed),
        result.num_doubled(undisturbed),
        result.difference(undisturbed),
    )
    table.add(row)
    with capsys.disabled():
        print(f"\n{' | '.join(row.cells())}")
    output = scene.client.output(log)
    table.keep(log, output)
    assert codes[-1] == 0, output[-3000:]
    assert "Traceback" not in output
    assert (result.status, row.lost, row.doubled) == ("FINISHED", 0, 0)
    assert row.difference <= (1e-4 if fault.resizes else 0.0)
    assert fault.resizes or result.weights == undisturbed.weights


def wait_for_end(process: subprocess.Popen[str], ranks: Sequence[int]) -> tuple[int, float | None]:
    """Wait for a command; return its exit code, and when the last of `ranks` was gone, if that was before."""
    gone, deadline = None, time.monotonic() + SECONDS
    while process.poll() is None:
        if gone is None and not any(Path(f"/proc/{pid}").exists() for pid in ranks):
            gone = time.time()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process.returncode, gone


def submit_again(scene: Scene, name: str, flags: Sequence[str], ranks: Sequence[int]) -> int:
    """Submit a run a second time, as a person does; start a head before where there is none."""
    log = f"{name}-again.txt"
    if not scene.cluster.alive():
        scene.prepare(scene.nodes)
    again = scene.submit(name, *flags, log=log)
    return again.wait(SECONDS)
