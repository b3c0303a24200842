"""Prometheus itself reads a live run on Ray: every panel of the dashboard and every alert finds its data."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster_files.files import CLUSTER, text_of
from tests.data.servers import free_port
from tests.launch.jobs.real_head import read_until, small_head, wait_until
from tests.paths import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        shutil.which("prometheus") is None, reason="needs Prometheus (apt-get install prometheus)"
    ),
]
STEPS = 50_000
NEEDS_GPU = "ray_node_gpus_utilization"
NEEDS_AN_END = "offset 10m"  # data of ten minutes ago
COMPARISON = re.compile(r"\s*(>=|>|<)\s*[\d.* ]+$")


@dataclass
class Prometheus:
    """A server that reads what cluster/prometheus.yaml names."""

    url: str

    def ask(self, path: str, **parameters: str) -> Any:
        query = f"?{urllib.parse.urlencode(parameters)}" if parameters else ""
        with urllib.request.urlopen(f"{self.url}{path}{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def values(self, expression: str) -> list[float]:
        return [float(series["value"][1]) for series in self.ask("/api/v1/query", query=expression)["result"]]

    def answers(self) -> bool:
        try:
            self.ask("/api/v1/status/runtimeinfo")
        except OSError:
            return False
        return True


@contextmanager
def prometheus(folder: Path, nodes: Path) -> Iterator[Prometheus]:
    """Start Prometheus with our configuration. nodes: the file in which Ray lists its nodes."""
    text = text_of("prometheus.yaml").replace("/tmp/ray/prom_metrics_service_discovery.json", str(nodes))
    text = text.replace("interval: 15s", "interval: 1s")
    text = text.replace("- prometheus-rules.yaml", f"- {CLUSTER}/prometheus-rules.yaml")
    (folder / "prometheus.yaml").write_text(text)
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=log, stderr=log, cwd=folder
        )
    try:
        made = Prometheus(f"http://{address}")
        wait_until(made.answers)
        yield made
    finally:
        process.terminate()
        process.wait(30)


def panels() -> list[tuple[str, str]]:
    found = json.loads(text_of("grafana-dashboard.json"))["panels"]
    return [(panel["title"], target["expr"]) for panel in found for target in panel["targets"]]


def alerts() -> list[tuple[str, str]]:
    (group,) = yaml.safe_load(text_of("prometheus-rules.yaml"))["groups"]
    return [(rule["alert"], rule["expr"]) for rule in group["rules"]]


def test_every_panel_and_alert_has_data_of_a_live_run(tmp_path: Path, digits_data: Path) -> None:
    fields = [f"data.{part}={digits_data}/{part}" for part in ("train", "eval")]
    fields += ["model.name=resnet8", f"train.length={STEPS} steps", "train.checkpoint_every=20 steps"]
    sets = [word for field in fields for word in ("--set", field)]
    with small_head(tmp_path) as head, head.running(), ExitStack() as stack:
        nodes = next(Path(head.variables["RAY_TMPDIR"]).rglob("prom_metrics_service_discovery.json"))
        with prometheus(tmp_path, nodes) as server:
            client = head.start(
                "submit", str(ROOT / "jobs/digits.py"), "--workers", "1", "--name", "x", *sets
            )
            stack.callback(client.kill)
            read_until(client, "step 20/")
            # The gauges come every 15 s, and Ray passes them on when it likes.
            wait_until(lambda: server.values("ray_resnet_dist_images_per_second") != [])
            wait_until(lambda: server.values('ray_resnet_dist_step{run="x"}') != [])
            assert server.values("ray_resnet_dist_total_steps") == [STEPS]
            assert 0 < server.values("ray_resnet_dist_step")[0] < STEPS
            empty = [
                (title, expression)
                for title, expression in panels()
                if not server.values(expression.replace("$run", "x")) and NEEDS_GPU not in expression
            ]
            assert empty == []
            for name, expression in alerts():
                if NEEDS_AN_END not in expression:
                    plain = COMPARISON.sub("", expression)
                    assert plain != expression
                    assert server.values(plain) != [], name
                    assert server.values(expression) == [], f"{name} fires for a run that is well"
            rules = server.ask("/api/v1/rules")["groups"][0]["rules"]
            assert {rule["name"]: rule["health"] for rule in rules} == {name: "ok" for name, _ in alerts()}
            code, output = head.run("stop", "x")
            assert code == 0, output
            client.communicate(timeout=400)
            # Otherwise a finished run would raise the alert of one that hangs.
            wait_until(lambda: server.values("ray_resnet_dist_step") == [])
