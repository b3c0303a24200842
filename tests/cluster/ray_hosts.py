"""A Ray cluster on such hosts: a head without CPUs for ranks, and nodes of one CPU each."""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import Host, hosts, wait_until
from tests.paths import ROOT

GCS_PORT, DASHBOARD_PORT = 6379, 8265
PYTHON = sys.executable


@dataclass
class RayCluster:
    """A head, its nodes, and hosts that are no nodes yet."""

    head: Host
    nodes: list[Host]
    spare: list[Host]

    @property
    def address(self) -> str:
        return f"{self.head.address}:{GCS_PORT}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    def join(self, host: Host) -> None:
        """Start a host as a node of one CPU."""
        host.start(
            [*_ray("start"), "--address", self.address, "--num-cpus", "1", *_place(host)], log="ray.log"
        )

    def drain(self, host: Host, seconds: int) -> None:
        """Announce that a node will be taken away, as a cloud does with a preemptible one."""
        program = (
            f"import ray; ray.init(address={self.address!r}, logging_level='ERROR', log_to_driver=False); "
            f"print([node['NodeID'] for node in ray.nodes() if node['NodeManagerAddress'] == {host.address!r}][0])"
        )
        node = self.head.run([PYTHON, "-c", program]).splitlines()[-1]
        self.head.run(
            [
                PYTHON,
                "-m",
                "ray.scripts.scripts",
                "drain-node",
                f"--address={self.address}",
                f"--node-id={node}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=test",
                f"--deadline-remaining-seconds={seconds}",
            ]
        )

    def alive(self) -> int:
        """Return the number of nodes that the cluster counts as alive, with the head."""
        program = (
            f"import json, ray; ray.init(address={self.address!r}, logging_level='ERROR', log_to_driver=False); "
            "print(json.dumps([node['Alive'] for node in ray.nodes()]))"
        )
        return sum(json.loads(self.head.run([PYTHON, "-c", program]).splitlines()[-1]))

    def train(self, *words: str, log: str = "log", environment: Mapping[str, str] | None = None):  # type: ignore[no-untyped-def]
        """Start `train` on the head, which is where a job's driver runs."""
        command = [
            PYTHON,
            "-m",
            "resnet_dist",
            "train",
            str(ROOT / "jobs/digits.py"),
            "--address",
            self.address,
        ]
        return self.head.start([*command, *words], environment, log=log)


@contextmanager
def ray_cluster(nodes: int, spare: int = 0) -> Iterator[RayCluster]:
    """Yield a cluster of `nodes` nodes, h1 and so on, whose head is h0, and of spare hosts."""
    names = [f"h{number}" for number in range(1 + nodes + spare)]
    token = secrets.token_hex(32)
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": "",
    }
    with hosts(*names, environment=environment) as made:
        cluster = RayCluster(made[0], made[1 : 1 + nodes], made[1 + nodes :])
        cluster.head.start(
            [
                *_ray("start"),
                "--head",
                f"--port={GCS_PORT}",
                "--dashboard-host=0.0.0.0",
                f"--dashboard-port={DASHBOARD_PORT}",
                "--num-cpus=0",
                *_place(cluster.head),
            ],
            log="ray.log",
        )
        cluster.head.wait_for("Ray runtime started", 120, log="ray.log")
        for node in cluster.nodes:
            cluster.join(node)
        for node in cluster.nodes:
            node.wait_for("Ray runtime started", 120, log="ray.log")
        wait_until(lambda: cluster.alive() == 1 + nodes, 120, lambda: "the nodes do not join")
        yield cluster


def _ray(command: str) -> list[str]:
    return [PYTHON, "-m", "ray.scripts.scripts", command, "--block", "--disable-usage-stats"]


def _place(host: Host) -> list[str]:
    return [
        f"--node-ip-address={host.address}",
        f"--temp-dir={host.folder}/r",
        f"--object-store-memory={2**27}",
    ]
