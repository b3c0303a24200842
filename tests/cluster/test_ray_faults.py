"""Each fault of a machine in the middle of a run: nobody helps, and the run ends with the metrics of an undisturbed one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from resnet_dist.launch.preload.client import SERVER
from tests.cluster.conftest import FLAGS
from tests.cluster.fault_table import FaultTable
from tests.cluster.hosts import needs_hosts, wait_until
from tests.cluster.ray_hosts import GCS, RANK, RAYLET
from tests.cluster.results import Result, journal, next_step_time
from tests.cluster.scene import DRIVER, Scene
from tests.rank_processes import copies

pytestmark = [needs_hosts, pytest.mark.long, pytest.mark.timeout(1200)]
SECONDS = 600.0  # limit for each wait
ORPHAN_SECONDS = 400.0  # limit for a rank that lost its driver
STRIKE_STEP = 25


@dataclass(frozen=True)
class Fault:
    """A fault; strike: called with the scene and the name of the run that trains."""

    name: str
    strike: Callable[[Scene, str], None]
    line: str = "attempt 2 resumes from step"  # that the client must show
    num_nodes: int = 2  # at the start of the run
    # Where the driver ends too, a person prepares the cluster by this, and submits again.
    repair: Callable[[Scene], None] | None = None
    # The number of ranks changes: sums over them may differ in their last bits.
    resizes: bool = False
    flags: tuple[str, ...] = ()  # additional ones of the submission


def kill_rank(scene: Scene, run: str) -> None:
    scene.host_of_rank(run, 1).kill(RANK)


def freeze_rank(scene: Scene, run: str) -> None:
    """Stop the process of rank 1, as a debugger or a full swap does: it is there, and answers nobody."""
    host = scene.host_of_rank(run, 1)
    for pid in copies(host.find(SERVER)):
        os.kill(pid, signal.SIGSTOP)


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


def leave_as_it_is(scene: Scene) -> None:
    pass


def restart_head(scene: Scene) -> None:
    """Start a head in place of the one that died, and then nodes, once the ranks of the old ones have ended."""
    scene.cluster.head.crash()
    scene.cluster.start_head()
    wait_until(lambda: not scene.rank_processes(), ORPHAN_SECONDS, lambda: "ranks outlive their driver")
    scene.prepare(scene.nodes)


STALL = "--set=train.stall_timeout_seconds=30"
ROOM = "room for 2 ranks instead of 1: saving a checkpoint"
DRAIN = "1 node(s) with ranks are being taken away: saving a checkpoint"
FAULTS = [
    Fault("kill -9 of a rank", kill_rank, "was killed or crashed; attempt 2 resumes from step"),
    Fault("a rank that is stopped (SIGSTOP)", freeze_rank, "has not answered", flags=(STALL,)),
    Fault("kill -9 of a raylet", kill_raylet, resizes=True),
    Fault("kill -9 of all processes of the node of rank 0", crash_node, resizes=True),
    Fault("link of a node cut for 5 s", cut_link_for_5_seconds, line=""),
    Fault("link of the node of rank 0 cut for good", cut_link, resizes=True),
    Fault("a node added", add_node, ROOM, num_nodes=1, resizes=True),
    Fault("a node drained", drain_node, DRAIN, resizes=True),
    Fault("kill -9 of the driver", kill_driver, "was killed (SIGKILL", repair=leave_as_it_is),
    Fault("kill -9 of the GCS", kill_gcs, "resumed at step", repair=restart_head),
]


class RanksWatch:
    """Sees, in a thread, when the last of some processes has gone."""

    def __init__(self, processes: Sequence[int]) -> None:
        self._processes = processes
        self._gone_at: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def wait(self) -> float | None:
        """Wait for the end of the processes; return its time, or None where they outlive ORPHAN_SECONDS."""
        self._thread.join(ORPHAN_SECONDS)
        self._stop.set()
        return self._gone_at

    def _watch(self) -> None:
        while any(Path(f"/proc/{pid}").exists() for pid in self._processes):
            if self._stop.wait(0.1):
                return
        self._gone_at = time.time()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_run_survives(
    whole_scene: Scene,
    undisturbed: Result,
    data_flags: list[str],
    table: FaultTable,
    fault: Fault,
) -> None:
    scene, name = whole_scene, f"fault-{FAULTS.index(fault) + 1}"
    flags = [*FLAGS, *data_flags, *fault.flags]
    log = f"{name}.txt"
    scene.prepare(scene.nodes[: fault.num_nodes])
    process = scene.submit(name, *flags, log=log)
    scene.client.wait_for(f"\nstep {STRIKE_STEP}/", SECONDS, log=log)
    ranks, struck = RanksWatch(scene.rank_processes()), time.time()
    fault.strike(scene, name)
    codes = [process.wait(SECONDS)]
    if fault.repair is not None:
        fault.repair(scene)
        again = scene.submit(name, *flags, log=log)
        codes.append(again.wait(SECONDS))
    gone = ranks.wait()
    run = scene.run(name)
    result = Result.of(scene.mlflow, run)
    row = table.add(
        fault.name,
        run,
        result,
        undisturbed,
        next_step_seconds=next_step_time(journal(run), struck) - struck,
        ranks_gone_seconds=None if gone is None else gone - struck,
        exit_codes=codes,
    )
    output = scene.client.output(log)
    table.keep(log, output)
    assert codes[-1] == 0, output[-3000:]
    assert fault.line in output
    assert "Traceback" not in output
    assert (result.status, row.lost, row.doubled) == ("FINISHED", 0, 0)
    assert gone is not None, "a rank that lost its driver is alive"
    assert row.difference <= (1e-4 if fault.resizes else 0.0)
    assert fault.resizes or result.weights == undisturbed.weights
