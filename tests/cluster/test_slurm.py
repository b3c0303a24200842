"""cluster/slurm.sbatch on a Slurm cluster: a job that is cut short is queued again and ends with the undisturbed curve."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.runs.folder import read_run
from resnet_dist.runs.storage.open import open_storage
from tests.cluster.hosts import needs_hosts, wait_until
from tests.cluster.ray_hosts import PYTHON
from tests.cluster.results import Result
from tests.cluster.slurm import Slurm, require_slurm, slurm
from tests.paths import ROOT

pytestmark = [needs_hosts, pytest.mark.long, pytest.mark.timeout(900)]
SCRIPT, RECIPE = ROOT / "cluster/slurm.sbatch", ROOT / "jobs/digits.py"
SECONDS = 400.0  # limit for each wait
# The header asks for more than the two nodes have.
RESOURCES = ["--cpus-per-task=1", "--gpus-per-node=0"]


@pytest.fixture(scope="module")
def cluster(digits_data: Path) -> Iterator[Slurm]:
    require_slurm()
    with tempfile.TemporaryDirectory(prefix="rd", dir="/var/tmp") as folder:
        shutil.copytree(digits_data, f"{folder}/data")
        with slurm(Path(folder)) as made:
            yield made


def flags(cluster: Slurm) -> list[str]:
    fields = ["model.name=resnet32", "train.length=120 steps", "train.checkpoint_every=50 steps"]
    fields += ["train.log_every=5 steps", "train.eval_every=60 steps"]
    fields += [f"data.{part}={cluster.shared}/data/{part}" for part in ("train", "eval")]
    return ["--cpu", f"--output={cluster.shared}/output", *(f"--set={field}" for field in fields)]


@pytest.fixture(scope="module")
def undisturbed(cluster: Slurm) -> Result:
    """Return the result of the same training as two ranks of one thread on this machine, without Slurm."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "resnet_dist"]
    done = subprocess.run(
        ["taskset", "-c", cores, *torchrun, "train", str(RECIPE), "--name", "undisturbed", *flags(cluster)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return result(cluster, "undisturbed")


def result(cluster: Slurm, name: str) -> Result:
    run = read_run(open_storage(cluster.shared / "output/runs" / name))
    assert run is not None
    return Result.of(f"sqlite:///{cluster.shared}/output/mlflow.db", run)


def submit(cluster: Slurm, launcher: str, *, path: str = "") -> str:
    search = f"{path}:{cluster.controller.environment['PATH']}" if path else ""
    variables = f"--export=ALL,LAUNCHER={launcher}" + (f",PATH={search}" if search else "")
    return cluster.submit(*RESOURCES, variables, str(SCRIPT), str(RECIPE), *flags(cluster))


def preempt(cluster: Slurm, job: str) -> None:
    """Let Slurm take the nodes for another job."""
    cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap", "true")


def reach_time_limit(cluster: Slurm, job: str) -> None:
    """Send what Slurm sends shortly before the time limit of a job."""
    cluster.controller.run(["scancel", "--signal=USR1", "--batch", job])


@pytest.mark.parametrize(
    ("launcher", "cut_short"), [("torchrun", preempt), ("ray", reach_time_limit)], ids=["torchrun", "ray"]
)
def test_a_job_that_is_cut_short_continues_its_run(
    cluster: Slurm, undisturbed: Result, launcher: str, cut_short: object
) -> None:
    assert callable(cut_short)
    job = submit(cluster, launcher)
    wait_until(lambda: bool(list(cluster.shared.glob(f"*-{job}.log"))), SECONDS, lambda: cluster.show(job))
    wait_until(lambda: "\nstep 20/" in cluster.log(job), SECONDS, lambda: cluster.log(job)[-3000:])
    cut_short(cluster, job)
    cluster.wait_for_state(job, "PENDING", SECONDS)
    cluster.start_now(job)
    cluster.wait_for_state(job, "COMPLETED", SECONDS)
    log = cluster.log(job)
    (stopped,) = re.findall(r"interrupted at step (\d+);", log)
    assert f"resumed at step {stopped} of 120" in log
    assert result(cluster, f"resnet-dist-{job}") == undisturbed  # bit for bit


def test_a_ray_that_does_not_start_fails_the_job(cluster: Slurm) -> None:
    """`ray symmetric-run` itself ends with 0 then."""
    (cluster.shared / "bin").mkdir()
    ray = cluster.shared / "bin/ray"
    ray.write_text("#!/bin/sh\nexit 0\n")
    ray.chmod(0o755)
    job = submit(cluster, "ray", path=str(ray.parent))
    cluster.wait_for_state(job, "FAILED", SECONDS)
    assert cluster.exit_code(job) == "1:0"
    assert "error: ray has not started or finished the training" in cluster.log(job)
