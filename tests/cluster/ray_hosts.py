"""A Ray cluster on such hosts: a head without CPUs for ranks, and nodes of one CPU each."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.hosts import TEMPORARY, Host, wait_until
from tests.paths import ROOT
from tests.rank_processes import RAY_PROCESS

GCS_PORT, DASHBOARD_PORT = 6379, 8265
PYTHON = sys.executable
LOG = "ray.log"
START_SECONDS = 300.0
# In the command lines of the processes of Ray.
RANK, RAYLET, GCS = RAY_PROCESS, "/raylet/raylet ", "/gcs/gcs_server "


@dataclass
class RayCluster:
    """A head, and hosts that are its nodes or can become some."""

    head: Host
    nodes: list[Host]
    token: str = field(default_factory=lambda: secrets.token_hex(32))
    _joining: dict[str, subprocess.Popen[str]] = field(default_factory=dict)  # by host

    @property
    def address(self) -> str:
        return f"{self.head.address}:{GCS_PORT}"

    @property
    def dashboard(self) -> str:
        return f"http://{self.head.address}:{DASHBOARD_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment of all processes of the cluster, and of its clients."""
        return {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "OMP_NUM_THREADS": "1",
        }

    def start_head(self) -> None:
        options = ["--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}", "--num-cpus=0"]
        command = [*_ray("start"), "--head", f"--port={GCS_PORT}", *options, *_place(self.head)]
        starting = self.head.start(command, log=LOG)

        def answers() -> bool:
            nonlocal starting
            if starting.poll() is not None:  # As below: after 30 s.
                self.head.crash()
                starting = self.head.start(command, log=LOG)
            return self.head.address in self.alive()

        wait_until(answers, START_SECONDS, lambda: self.head.output(LOG))

    def join(self, host: Host) -> subprocess.Popen[str]:
        """Start a host as a node of one CPU; return the process that ends where it cannot join."""
        command = [*_ray("start"), "--address", self.address, "--num-cpus", "1", *_place(host)]
        self._joining[host.name] = host.start(command, log=LOG)
        return self._joining[host.name]

    def wait_for_nodes(self, *wanted: Host) -> None:
        """Wait until these hosts, and no others, are nodes beside the head."""
        addresses = {self.head.address, *(host.address for host in wanted)}

        def joined() -> bool:
            alive = self.alive()
            for host in wanted:
                # `ray start` gives up after 30 s, which a busy machine needs.
                if host.address not in alive and self._joining[host.name].poll() is not None:
                    host.crash()
                    self.join(host)
            return alive == addresses

        wait_until(joined, START_SECONDS, lambda: f"{self.alive()} instead of {addresses}")

    def drain(self, host: Host, seconds: int) -> None:
        """Announce that a node will be taken away, as a cloud does with a preemptible one."""
        (node,) = self.node_ids(host)
        self.head.run(
            [
                *_ray("drain-node"),
                f"--address={self.address}",
                f"--node-id={node}",
                "--reason=DRAIN_NODE_REASON_PREEMPTION",
                "--reason-message=test",
                f"--deadline-remaining-seconds={seconds}",
            ]
        )

    def alive(self) -> set[str]:
        """Return the addresses of the nodes that the cluster counts as alive, with the head; none without a head."""
        return {node["node_ip"] for node in self._alive_nodes()}

    def node_ids(self, host: Host) -> set[str]:
        """Return Ray's ids of a host that the cluster counts as alive; one that joins again has a new one."""
        return {node["node_id"] for node in self._alive_nodes() if node["node_ip"] == host.address}

    def _alive_nodes(self) -> list[dict[str, str]]:
        headers = {"Authorization": f"Bearer {self.token}"}
        request = urllib.request.Request(f"{self.dashboard}/api/v0/nodes", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                nodes = json.load(answer)["data"]["result"]["result"]
        except OSError:
            return []
        return [node for node in nodes if node["state"] == "ALIVE"]


def _ray(command: str) -> list[str]:
    options = ["--block", "--disable-usage-stats"] if command == "start" else []
    return [PYTHON, "-m", "ray.scripts.scripts", command, *options]


def _place(host: Host) -> list[str]:
    return [
        f"--node-ip-address={host.address}",
        f"--temp-dir={TEMPORARY}/r",
        f"--object-store-memory={2**27}",
    ]
