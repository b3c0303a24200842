"""The faults: each strikes a run that trains, and returns once what it began is over, but for a node that comes back."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from resnet_dist.launch.preload.client import SERVER
from tests.benchmarks.soak.scene import Soak
from tests.cluster.hosts import Host
from tests.cluster.ray_hosts import RANK, RAYLET
from tests.rank_processes import copies
from tests.s3_server import no_fault

PAUSE_SECONDS = (20.0, 60.0)
OUTAGE_SECONDS = 15.0
LINK_SECONDS = 5.0
CLIENT_SECONDS = 300.0  # for the client to see that the driver is dead


@dataclass(frozen=True)
class Strike:
    """One fault to come: `pause` seconds after the one before, on node `node` where it strikes one."""

    pause: float
    fault: str
    node: int


def planned(seed: int, num_nodes: int) -> Iterator[Strike]:
    """Yield the faults of a seed, forever: all kinds in a random order, then again in another one."""
    draw = random.Random(seed)
    while True:
        for fault in draw.sample(list(FAULTS), len(FAULTS)):
            yield Strike(draw.uniform(*PAUSE_SECONDS), fault, draw.randrange(num_nodes))


def kill_rank(soak: Soak, node: int) -> None:
    there(soak, node).kill(RANK)


def freeze_rank(soak: Soak, node: int) -> None:
    host = there(soak, node)
    pids = copies(host.find(SERVER))
    assert pids, f"{host.name} has no rank"
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def kill_raylet(soak: Soak, node: int) -> None:
    there(soak, node).kill(RAYLET)
    soak.bring_back(node)


def crash_node(soak: Soak, node: int) -> None:
    there(soak, node).end()
    soak.bring_back(node)


def cut_link(soak: Soak, node: int) -> None:
    host = there(soak, node)
    host.set_link(up=False)
    time.sleep(LINK_SECONDS)
    host.set_link(up=True)


def kill_driver(soak: Soak, node: int) -> None:
    assert soak.process is not None
    soak.scene.cluster.head.kill("-m resnet_dist train")
    soak.process.wait(CLIENT_SECONDS)


def take_tracker_away(soak: Soak, node: int) -> None:
    with soak.mlflow.away():
        time.sleep(OUTAGE_SECONDS)


def refuse_storage(soak: Soak, node: int) -> None:
    soak.s3.fault = lambda method, path: "refuse"
    time.sleep(OUTAGE_SECONDS)
    soak.s3.fault = no_fault


def there(soak: Soak, node: int) -> Host:
    host = soak.scene.nodes[node]
    assert not soak.is_away(node), f"{host.name} is away"
    return host


FAULTS: dict[str, Callable[[Soak, int], None]] = {
    "kill -9 of a rank": kill_rank,
    "a rank that is stopped (SIGSTOP)": freeze_rank,
    "kill -9 of a raylet, then a new one": kill_raylet,
    "power cut of a node, which comes back": crash_node,
    "the link of a node is cut for 5 s": cut_link,
    "kill -9 of the driver, then the same submission": kill_driver,
    "MLflow is away for 15 s": take_tracker_away,
    "the store refuses all requests for 15 s": refuse_storage,
}
