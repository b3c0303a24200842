"""torchrun on two hosts, elastic: one is lost, the other one goes on alone from the newest checkpoint, to the same end."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.runs.folder import RunFolder, read_run
from resnet_dist.runs.storage.open import open_storage
from tests.cluster.hosts import Host, hosts, needs_hosts, wait_until
from tests.cluster.ray_hosts import PYTHON
from tests.cluster.results import Result
from tests.paths import ROOT

pytestmark = [needs_hosts, pytest.mark.long, pytest.mark.timeout(900)]
SECONDS = 400.0  # limit for each wait
FIELDS = ["train.length=60 steps", "train.checkpoint_every=10 steps", "train.log_every=5 steps"]
FIELDS += ["train.eval_every=30 steps"]
RENDEZVOUS = "last_call_timeout=15"  # seconds that one host waits for another one to join


@pytest.fixture(scope="module")
def shared(digits_data: Path) -> Iterator[Path]:
    """Return a folder outside /tmp, which hosts see, with the data."""
    with tempfile.TemporaryDirectory(prefix="rd", dir="/var/tmp") as folder:
        shutil.copytree(digits_data, f"{folder}/data")
        yield Path(folder)


def start(host: Host, head: Host, nnodes: str, name: str, shared: Path) -> subprocess.Popen[str]:
    torchrun = ["--nnodes", nnodes, "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", name]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{head.address}:29400"]
    torchrun += ["--rdzv-conf", RENDEZVOUS, "--local-addr", host.address, "-m", "resnet_dist"]
    data = [f"data.{part}={shared}/data/{part}" for part in ("train", "eval")]
    fields = [word for field in (*FIELDS, *data) for word in ("--set", field)]
    train = ["train", str(ROOT / "jobs/digits.py"), "--cpu", "--name", name, "--output", f"{shared}/output"]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [PYTHON, "-m", "torch.distributed.run", *torchrun, *train, *fields]
    return host.start(command, variables, log=f"{name}.txt")


def run_of(shared: Path, name: str) -> RunFolder:
    run = read_run(open_storage(shared / "output/runs" / name))
    assert run is not None
    return run


def test_a_host_is_lost_and_the_other_one_finishes(shared: Path) -> None:
    with hosts("h1", "h2") as (h1, h2):

        def output() -> str:
            return h1.output("lost.txt") + h2.output("lost.txt")

        first = start(h1, h1, "1:2", "lost", shared)
        start(h2, h1, "1:2", "lost", shared)
        wait_until(lambda: "\nstep 25/" in output(), SECONDS, lambda: output()[-3000:])
        places = run_of(shared, "lost").ranks()
        assert places is not None
        assert sorted(places.hosts) == ["h1", "h2"]
        h2.crash()
        assert first.wait(SECONDS) == 0, output()[-3000:]
        run = run_of(shared, "lost")
        places = run.ranks()
        assert places is not None
        assert list(places.hosts) == ["h1"]
        assert re.search("resumed at step [23]0 of 60", h1.output("lost.txt"))

        alone = start(h1, h1, "1", "alone", shared)
        assert alone.wait(SECONDS) == 0, h1.output("alone.txt")[-3000:]
    tracking = f"sqlite:///{shared}/output/mlflow.db"
    result, undisturbed = Result.of(tracking, run), Result.of(tracking, run_of(shared, "alone"))
    assert (result.status, result.num_lost(undisturbed), result.num_doubled(undisturbed)) == (
        "FINISHED",
        0,
        0,
    )
    assert result.difference(undisturbed) <= 1e-4  # Sums over one and two ranks differ in their last bits.
