"""The whole scene: a cluster, its servers and a client, each on a host of its own, sharing nothing but S3 and MLflow."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from resnet_dist.launch.preload.client import SERVER
from resnet_dist.runs.folder import RunFolder, read_run
from resnet_dist.runs.storage.open import open_storage
from tests.cluster.hosts import Host, hosts
from tests.cluster.ray_hosts import PYTHON, RANK, RayCluster
from tests.cluster.services import make_bucket, start_mlflow, start_nginx, start_s3
from tests.paths import ROOT
from tests.rank_processes import copies

OUTPUT = "s3://runs/output"
RECIPE = ROOT / "jobs/digits.py"
DRIVER = "-m resnet_dist train"  # in the command line of the driver of a submitted job
LEAVE_SECONDS = 60.0  # limit for the processes of a run that has ended


@dataclass
class Scene:
    """Three hosts with Ray (h0 is the head), a fourth that submits, and what they all reach."""

    cluster: RayCluster
    client: Host
    mlflow: str  # its address
    shards: str  # the address of folders train and eval
    servers: Sequence[Host] = ()

    @property
    def gateway(self) -> str:
        """Return the address of this machine, as the hosts see it."""
        return f"{self.client.address.rpartition('.')[0]}.254"

    @property
    def nodes(self) -> list[Host]:
        return self.cluster.nodes

    @property
    def ray_hosts(self) -> list[Host]:
        """Return all hosts but those of the servers."""
        return [self.cluster.head, *self.nodes, self.client]

    def submit(
        self, name: str, *words: str, log: str, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Submit a run of digits, with additional variables in the client's environment; its output goes to `log` there."""
        place = ["--address", self.cluster.dashboard, "--output", OUTPUT, "--name", name]
        return self.client.start(
            [PYTHON, "-m", "resnet_dist", "submit", str(RECIPE), *place, *words], variables, log=log
        )

    def train_alone(self, name: str, *words: str, log: str) -> subprocess.Popen[str]:
        """Train digits on the client alone, as two ranks of one thread each."""
        # Ray there gets two CPUs, however many this machine has.
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
        command = [
            "taskset",
            "-c",
            cores,
            PYTHON,
            "-m",
            "resnet_dist",
            "train",
            str(RECIPE),
            "--workers",
            "2",
        ]
        return self.client.start([*command, "--output", OUTPUT, "--name", name, *words], log=log)

    def run(self, name: str) -> RunFolder:
        """Return a run as its storage has it."""
        run = read_run(open_storage(f"{OUTPUT}/runs/{name}"))
        assert run is not None
        return run

    def host_of_rank(self, run: str, rank: int) -> Host:
        places = self.run(run).ranks()
        assert places is not None
        (host,) = [host for host in self.nodes if host.name == places.hosts[rank]]
        return host

    def rank_processes(self) -> list[int]:
        found = []
        for host in self.nodes:
            found += host.find(RANK) + copies(host.find(SERVER))
        return found

    def prepare(self, nodes: Sequence[Host]) -> None:
        """Make these the nodes of the cluster, whatever happened to it before."""
        if not self.cluster.alive() or self._is_in_use():
            for host in (self.cluster.head, *self.nodes):
                host.crash()
            self.cluster.start_head()
        alive = self.cluster.alive()
        for host in self.nodes:
            host.set_link(up=True)
            if (host.address in alive) != (host in nodes):
                host.crash()
                if host in nodes:
                    self.cluster.join(host)
        self.cluster.wait_for_nodes(*nodes)

    def is_whole(self) -> bool:
        """Report whether the head and the servers answer, and no run is left on the cluster."""
        servers = (self.mlflow, self.shards, self.client.environment["AWS_ENDPOINT_URL"])
        return bool(self.cluster.alive()) and all(map(_answers, servers)) and not self._is_in_use()

    def _is_in_use(self) -> bool:
        """Report whether a test that failed has left a run on the cluster: it would take the place of the next one."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while found := self.rank_processes() or self.cluster.head.find(DRIVER):
            if time.monotonic() > deadline:
                return bool(found)
            time.sleep(0.1)
        return False


def _answers(address: str) -> bool:
    parts = urlsplit(address)
    with suppress(OSError), socket.create_connection((parts.hostname, parts.port), timeout=10):
        return True
    return False


@contextmanager
def scene(shards: Path) -> Iterator[Scene]:
    """Yield the scene, with its servers and a cluster of two nodes. shards: a folder with train and eval."""
    with hosts("h0", "h1", "h2", "client", "s3", "mlflow", "web") as (head, h1, h2, client, s3, mlflow, web):
        cluster = RayCluster(head, [h1, h2])
        for host in (head, h1, h2, client, s3, mlflow, web):
            host.environment.update(cluster.environment)
        keys, wait_for_s3 = start_s3(s3)
        tracking, wait_for_mlflow = start_mlflow(mlflow)
        files, wait_for_nginx = start_nginx(web, shards)
        for host in (head, h1, h2, client):
            host.environment.update(keys)
        client.environment["MLFLOW_TRACKING_URI"] = tracking
        cluster.start_head()
        for host in cluster.nodes:
            cluster.join(host)
        wait_for_s3()
        make_bucket(s3, OUTPUT.split("/")[2])
        wait_for_nginx()
        wait_for_mlflow()
        cluster.wait_for_nodes(*cluster.nodes)
        before = {name: os.environ.get(name) for name in keys}
        os.environ.update(keys)  # The test reads what the runs have written.
        try:
            yield Scene(cluster, client, tracking, files, (s3, mlflow, web))
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
