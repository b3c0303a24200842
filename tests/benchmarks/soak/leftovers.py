"""The leftovers of a run: files on the hosts, objects in the bucket, processes, runs that are open."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator

import boto3
import mlflow

from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.holder import Holder
from resnet_dist.runs.storage.lease import LEASE_FILE
from resnet_dist.train.checkpoint.folder import MANIFEST
from tests.benchmarks.soak.scene import RUN, UNDISTURBED, Soak
from tests.cluster.hosts import Host
from tests.cluster.scene import OUTPUT

ENDING_SECONDS = 120.0  # in which processes end by themselves
# In the folder of a host: what the scene, Ray, the shard cache and the processes' own logs put there.
EXPECTED = ("r/", "w/", ".ready", "boot.log", "log", "ray.log", "soak.txt", "undisturbed.txt")
SHARDS = ".cache/resnet-dist/shards/"
BUCKET = OUTPUT.split("/")[2]


def files_of(host: Host) -> set[str]:
    """Return the paths of the files and sockets of a host that are not expected there."""
    paths = []
    for folder, folders, names in os.walk(host.folder):
        if folder == str(host.folder):
            folders[:] = [name for name in folders if f"{name}/" not in EXPECTED]
        paths += [os.path.relpath(f"{folder}/{name}", host.folder) for name in names]
    return {path for path in paths if path not in EXPECTED and not path.startswith(SHARDS)}


def left_files(soak: Soak) -> dict[str, set[str]]:
    return {host.name: files_of(host) for host in soak.scene.ray_hosts}


def left_processes(soak: Soak) -> list[str]:
    """Return the processes of the run that are still there after ENDING_SECONDS, with their hosts."""
    deadline = time.monotonic() + ENDING_SECONDS
    while True:
        found = [
            f"{host.name}: {words}"
            for host in soak.scene.ray_hosts
            for words in ("resnet_dist", "RayTrain", "TrainController")
            for _ in host.find(words)
        ]
        if not found or time.monotonic() >= deadline:
            return found
        time.sleep(1)


def left_objects(run: RunFolder, undisturbed: RunFolder) -> Iterator[str]:
    """Yield what the bucket has of this run, and not of the undisturbed one, by folder; and what is broken."""
    ours, theirs = ({one.name for one in each.storage.objects()} for each in (run, undisturbed))
    kinds = Counter(name.partition("/")[0] for name in ours - theirs)
    yield from (f"{kind}: {count} more" for kind, count in sorted(kinds.items()))
    yield from (f"missing: {name}" for name in sorted(theirs - ours) if not name.startswith("spool/"))
    bundles = {name.rpartition("/")[0] for name in ours if name.startswith("checkpoints/")}
    yield from (f"unfinished: {name}" for name in sorted(bundles) if f"{name}/{MANIFEST}" not in ours)
    lease = Holder.parse(run.storage.read(LEASE_FILE) or b"")
    if lease is not None:
        yield f"the lease is held by {lease}"
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
    if uploads:
        yield f"{len(uploads)} open multipart upload(s)"


def open_runs(soak: Soak) -> list[str]:
    """Return the MLflow runs that are not closed, or that are there twice."""
    client = mlflow.MlflowClient(soak.scene.mlflow)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    names = Counter(run.info.run_name for run in runs)
    bad = [f"{run.info.run_name}: {run.info.status}" for run in runs if run.info.status != "FINISHED"]
    return bad + [f"{name}: {count} runs" for name, count in names.items() if count > 1]


def doubled_points(soak: Soak) -> dict[str, int]:
    """Return the number of steps that a metric has more than once in MLflow, for all metrics but those of the system."""
    client = mlflow.MlflowClient(soak.scene.mlflow)
    run_id = soak.scene.run(RUN).run_id
    assert run_id is not None
    doubled = {}
    for name in client.get_run(run_id).data.metrics:
        if not name.startswith("system/"):
            steps = Counter(point.step for point in client.get_metric_history(run_id, name))
            if number := sum(count - 1 for count in steps.values()):
                doubled[name] = number
    return doubled


def left(soak: Soak, files_before: dict[str, set[str]]) -> Iterator[str]:
    """Yield a line for each thing that the run has left, beyond what the undisturbed one left."""
    yield from (f"process {found}" for found in left_processes(soak))
    for name, files in left_files(soak).items():
        yield from (f"{name}: file {path}" for path in sorted(files - files_before[name]))
    yield from left_objects(soak.scene.run(RUN), soak.scene.run(UNDISTURBED))
    yield from open_runs(soak)
    yield from (f"{name}: {number} doubled" for name, number in doubled_points(soak).items())
