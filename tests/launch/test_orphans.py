"""Ranks whose driver or whose Ray is killed end by themselves, write nothing, and the next submission finishes the run."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest

from resnet_dist.runs.folder import read_run
from resnet_dist.runs.storage.lease import EXPIRY_SECONDS
from resnet_dist.runs.storage.open import open_storage
from tests.paths import ROOT
from tests.rank_processes import RAY_PROCESS, ranks_with

GONE_SECONDS = (
    EXPIRY_SECONDS + 30.0
)  # after their driver; ranks end after 45 s at the latest, and their processes 10 s later
LIMIT_SECONDS = 240.0  # for everything else
FLAGS = [
    "model.name=resnet8",
    "train.length=240 steps",
    "train.log_every=5 steps",
    "train.eval_every=120 steps",
    "train.checkpoint_every=10 steps",
]


class Submission:
    """A run of two ranks on a Ray of its own, all in one session."""

    def __init__(self, name: str, output: Path) -> None:
        self.run = output / "runs" / name
        self.log = output.parent / f"{name}-{time.monotonic_ns()}.log"
        command = [sys.executable, "-m", "resnet_dist", "train", str(ROOT / "jobs/digits.py"), "--workers=2"]
        command += [f"--name={name}", f"--output={output}", *(f"--set={flag}" for flag in FLAGS)]
        self.mark = f"RESNET_DIST_TEST={uuid.uuid4().hex}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        environment.update([self.mark.split("=")])
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def pids(self, pattern: str) -> list[int]:
        command = ["pgrep", "-s", str(self.process.pid), "-f", pattern]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def kill(self, pattern: str) -> float:
        """Kill the processes of that name; return the time at which the driver had gone."""
        pids = self.pids(pattern)
        assert pids, pattern
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        # A driver that loses its GCS tries to reach it for 60 s, and its ranks train with it.
        assert self.process.wait(LIMIT_SECONDS) != 0
        return time.time()

    def wait_for(self, words: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def wait_until_ranks_are_gone(self) -> None:
        deadline = time.monotonic() + GONE_SECONDS
        while self.pids(RAY_PROCESS) or ranks_with(self.mark):
            assert time.monotonic() < deadline, "ranks outlive their lease"
            time.sleep(0.2)

    def clean_up(self) -> None:
        for pid in [*self.pids("."), *ranks_with(self.mark)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def newest_write(self) -> float:
        """Return the time of the newest change of a checkpoint or of the journal."""
        files = [*self.run.glob("checkpoints/*/*"), self.run / "spool.jsonl"]
        return max(path.stat().st_mtime for path in files)


def model_of(run: Path) -> str:
    return hashlib.sha256((run / "checkpoints/step-00000240/model.safetensors").read_bytes()).hexdigest()


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_ranks_end_with_their_driver_and_with_ray(tmp_path: Path) -> None:
    output = tmp_path / "output"
    for victim in ("resnet_dist train", "gcs_server"):
        first = Submission("x", output)
        try:
            first.wait_for("resumed" if victim == "gcs_server" else "step 15/240")
            ended_at = first.kill(victim)
            first.wait_until_ranks_are_gone()
            assert first.newest_write() <= ended_at + EXPIRY_SECONDS
        finally:
            first.clean_up()
    again, whole = Submission("x", output), None
    try:
        assert again.process.wait(LIMIT_SECONDS) == 0, again.log.read_text()
        whole = Submission("whole", output)
        assert whole.process.wait(LIMIT_SECONDS) == 0, whole.log.read_text()
    finally:
        again.clean_up()
        if whole is not None:
            whole.clean_up()
    run = read_run(open_storage(again.run))
    assert run is not None
    assert (run.status, run.attempt) == ("FINISHED", 3)
    assert model_of(again.run) == model_of(whole.run)
