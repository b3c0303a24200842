"""The scene of a soak: hosts, the proxies before their servers, and the run under test, which is submitted again and again."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from tests.cluster.conftest import data_at
from tests.cluster.scene import Scene, scene
from tests.cluster.services import MLFLOW_PORT, S3_PORT
from tests.s3_server import FaultyStore

RUN, LOG = "soak", "soak.txt"
UNDISTURBED, UNDISTURBED_LOG = "undisturbed", "undisturbed.txt"
JOIN_POLL_SECONDS = 0.5
JOIN_SECONDS = 600.0


@dataclass
class Soak:
    """The scene, the proxies before its servers, and the run under test."""

    scene: Scene
    mlflow: FaultyStore
    s3: FaultyStore
    words: Sequence[str]
    process: subprocess.Popen[str] | None = None
    codes: list[int] = field(default_factory=list)  # of all submissions that have ended
    struck: list[tuple[str, float]] = field(default_factory=list)  # fault and time
    # By node that comes back. The threads stay: a host ends with the thread that has booted it.
    _coming: dict[int, Future[None]] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=ThreadPoolExecutor)

    def submit(self) -> None:
        words = [*self.words, "--env", f"AWS_ENDPOINT_URL={self.s3.url}"]
        variables = {"MLFLOW_TRACKING_URI": self.mlflow.url}
        self.process = self.scene.submit(RUN, *words, log=LOG, variables=variables)

    def is_away(self, node: int) -> bool:
        """Report whether a node was struck and is not back yet."""
        return node in self._coming and not self._coming[node].done()

    def bring_back(self, node: int) -> None:
        """Start a node again, and wait for it in a thread."""
        self._coming[node] = self._pool.submit(self._bring_back, node)

    def wait_for_nodes(self) -> None:
        """Wait for the nodes that come back. Raises AssertionError where one does not."""
        for future in self._coming.values():
            future.result()

    def _bring_back(self, node: int) -> None:
        host, cluster = self.scene.nodes[node], self.scene.cluster
        before, deadline = cluster.node_ids(host), time.monotonic() + JOIN_SECONDS
        host.crash()
        joining = cluster.join(host)
        while not cluster.node_ids(host) - before:
            assert time.monotonic() < deadline, host.output()
            if joining.poll() is not None:  # `ray start` gives up after 30 s, which a busy machine needs.
                host.crash()
                joining = cluster.join(host)
            time.sleep(JOIN_POLL_SECONDS)


@contextmanager
def soaking(words: Sequence[str]) -> Iterator[Soak]:
    """Yield the scene, with the digits on its web server. words: the flags of both runs."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(open_source("digits"), Path(folder))
        with scene(Path(folder)) as made:
            s3_host, mlflow_host = (
                url.split("/")[2].partition(":")[0]
                for url in (made.client.environment["AWS_ENDPOINT_URL"], made.mlflow)
            )
            with (
                closing(FaultyStore(MLFLOW_PORT, host=mlflow_host, bind=made.gateway)) as mlflow,
                closing(FaultyStore(S3_PORT, host=s3_host, bind=made.gateway)) as s3,
            ):
                soak = Soak(made, mlflow, s3, [*words, *data_at(made.shards)])
                try:
                    yield soak
                finally:
                    soak.wait_for_nodes()
