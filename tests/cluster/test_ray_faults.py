"""One run on a cluster of three hosts that loses a rank and a node, gains a node, and gives one back: nobody helps it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from tests.cluster.hosts import needs_hosts
from tests.cluster.ray_hosts import PYTHON, RayCluster, ray_cluster
from tests.paths import ROOT

pytestmark = [needs_hosts, pytest.mark.long, pytest.mark.timeout(900)]
SECONDS = 240.0  # limit for each wait
# The net is deep enough for all of it to happen while it trains, on a fast machine too.
FLAGS = [
    "--set=model.name=resnet56",
    "--set=train.length=400 steps",
    "--set=train.eval_every=200 steps",
    "--set=train.checkpoint_every=20 steps",
    "--set=train.log_every=5 steps",
]
RANK = "RayTrainWorker"  # in the command line of a process that Ray runs as a rank


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(nodes=2, spare=1) as made:
        yield made


def metrics(database: Path, name: str) -> dict[str, list[tuple[int, float]]]:
    """Return the points of every metric but those of speed; fail unless the run is finished."""
    client = mlflow.MlflowClient(f"sqlite:///{database}")
    (run,) = client.search_runs(["1"], f"attributes.run_name = '{name}'")
    assert run.info.status == "FINISHED"
    return {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
        if not key.startswith("perf/")
    }


def test_a_run_survives_its_machines(cluster: RayCluster, tmp_path: Path) -> None:
    head, (h1, h2), (h3,) = cluster.head, cluster.nodes, cluster.spare
    process = cluster.train("--name", "x", "--workers", "1:2", "--output", str(tmp_path), *FLAGS)
    head.wait_for("step 25/400", SECONDS)

    h2.kill(signal.SIGKILL, RANK)
    head.wait_for("attempt 2 resumes from step", SECONDS)
    assert f"on h2 ({h2.address}) was killed or crashed" in head.output()
    head.wait_until_steps_follow("attempt 2 resumes", SECONDS)

    h2.kill()  # all its processes, as a power cut ends them
    head.wait_until_steps_follow("attempt 3 resumes", SECONDS)
    assert f"on h2 ({h2.address})" in head.output().partition("attempt 2")[2]

    cluster.join(h3)
    head.wait_for("room for 2 ranks instead of 1: saving a checkpoint", SECONDS)
    head.wait_until_steps_follow("attempt 4 resumes", SECONDS)

    cluster.drain(h3, seconds=60)
    head.wait_for("1 node(s) with ranks are being taken away: saving a checkpoint", SECONDS)
    head.wait_until_steps_follow("attempt 5 resumes", SECONDS)

    assert process.wait(SECONDS) == 0, head.output()[-3000:]
    assert "Traceback" not in head.output()
    h1.run(
        [
            PYTHON,
            "-m",
            "resnet_dist",
            "train",
            str(ROOT / "jobs/digits.py"),
            "--local",
            "--name",
            "whole",
            "--output",
            str(tmp_path),
            *FLAGS,
        ],
        timeout=600,
    )
    disturbed, whole = metrics(tmp_path / "mlflow.db", "x"), metrics(tmp_path / "mlflow.db", "whole")
    # One thread a rank here and there, so that only the order of a sum over two ranks can differ.
    assert disturbed.keys() == whole.keys()
    for name, points in whole.items():
        assert [step for step, _ in disturbed[name]] == [step for step, _ in points], name
        assert dict(disturbed[name]) == pytest.approx(dict(points), rel=1e-4, abs=1e-6), name
