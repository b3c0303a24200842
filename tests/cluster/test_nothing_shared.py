"""A run submitted from a fourth host to three that share nothing but S3 and MLflow is the run of one host."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from resnet_dist.train.checkpoint.folder import list_checkpoints
from tests.cluster.hosts import needs_hosts
from tests.cluster.results import Result, journal
from tests.cluster.scene import OUTPUT, Scene

pytestmark = [needs_hosts, pytest.mark.long, pytest.mark.timeout(900)]
SECONDS = 400.0
STEPS = 132  # of jobs/digits.py


def test_the_run_of_a_cluster_is_that_of_one_host(whole_scene: Scene) -> None:
    scene = whole_scene
    scene.prepare(scene.nodes)
    submitted = scene.submit("digits", "--workers", "2", log="digits.txt")
    assert submitted.wait(SECONDS) == 0, scene.client.output("digits.txt")[-3000:]
    alone = scene.train_alone("alone", log="alone.txt")
    assert alone.wait(SECONDS) == 0, scene.client.output("alone.txt")[-3000:]

    run = scene.run("digits")
    places = run.ranks()
    assert places is not None
    assert sorted(places.hosts) == ["h1", "h2"]
    ours, theirs = Result.of(scene.mlflow, run), Result.of(scene.mlflow, scene.run("alone"))
    assert ours.status == theirs.status == "FINISHED"
    assert len(ours.points["train/loss"]) > STEPS // 10
    assert ours == theirs  # bit for bit

    assert list_checkpoints(run.checkpoints)[-1] == f"step-{STEPS:08d}"
    logged = ours.steps("train/loss") | ours.steps("eval/loss")
    assert {entry.step for entry in journal(run) if entry.metrics} == logged
    kept = set(list_checkpoints(run.checkpoints)[:-1])
    # The whole model is that of the newest checkpoint; the others refer to theirs, also where that was removed.
    found = {model.name for model in models_of(scene.mlflow, run.run_id)}
    assert kept | {"model"} <= found
    assert [name for name in found if name == f"step-{STEPS:08d}"] == []
    # No host has kept the run, or knows the folders of another one.
    assert not [path for host in scene.nodes for path in host.folder.rglob("spool.jsonl")]
    assert OUTPUT in scene.client.output("digits.txt")
    # Neither Ray nor anything of ours has written the secrets of its environment down, on any host.
    for secret in (scene.cluster.token, scene.client.environment["AWS_SECRET_ACCESS_KEY"]):
        files = [path for host in scene.ray_hosts for path in host.folder.rglob("*") if path.is_file()]
        assert len(files) > 50
        assert [path for path in files if secret.encode() in content_of(path)] == []


def content_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:  # Ray removes files while it lives.
        return b""


def models_of(tracking: str, run_id: str | None) -> list[mlflow.entities.LoggedModel]:
    """Return the models that a run has logged."""
    client = mlflow.MlflowClient(tracking)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [model for model in client.search_logged_models(experiments) if model.source_run_id == run_id]
