"""Measure the seconds from the kill of a rank to the next step, beside the first start of the same ranks, by phase.

    python tests/benchmarks/recovery.py --rounds 3

Each round is a run of two ranks on a Ray of its own: a start, then `kill -9` of the rank's Ray process. RESNET_DIST_PRELOAD=0
measures ranks that import for themselves. Busy machines are slower in both: compare rounds of the same hour.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.spool import Entry, Follower
from tests.paths import ROOT
from tests.rank_processes import RAY_PROCESS

FLAGS = [
    "train.length=100000 steps",
    "train.log_every=5 steps",
    "train.eval_every=100000 steps",
    "train.checkpoint_every=20 steps",
]
STEPS_BEFORE_KILL = 60  # of the first attempt: it has checkpoints by then
LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class Start:
    """A start of the ranks: the seconds from its cause to the first step, and of its phases."""

    seconds: float
    phases: dict[str, float]


def measure(folder: Path, workers: int) -> tuple[Start, Start]:
    """Return a first start, and the restart of the same ranks after one was killed."""
    mark = f"RESNET_DIST_TEST={uuid.uuid4().hex}"
    command = [sys.executable, "-m", "resnet_dist", "train", str(ROOT / "jobs/digits.py"), "--name=x"]
    command += [f"--workers={workers}", f"--output={folder}", *(f"--set={flag}" for flag in FLAGS)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **dict([mark.split("=")])}
    with (folder / "output.txt").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        steps = _wait_for_steps(process, folder)
        os.kill(_ray_processes(mark)[-1], signal.SIGKILL)
        killed_at = time.time()
        starts = _wait_for_starts(process, folder, 2)
        assert steps
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LIMIT_SECONDS)
    first, again = (entry.start for entry in starts)
    assert first is not None
    assert again is not None
    whole = starts[1].time_ms / 1000 - killed_at
    seen = {"seen": round(whole - again["seconds"], 3)}
    return Start(first["seconds"], first["phases"]), Start(whole, {**seen, **again["phases"]})


def _entries(folder: Path) -> list[Entry]:
    spool = folder / "runs/x/spool.jsonl"
    return Follower(open_storage(spool.parent).log(spool.name)).read() if spool.exists() else []


def _wait_for_steps(process: subprocess.Popen[bytes], folder: Path) -> int:
    deadline = time.monotonic() + LIMIT_SECONDS
    while (steps := max((entry.step or 0 for entry in _entries(folder)), default=0)) < STEPS_BEFORE_KILL:
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return steps


def _wait_for_starts(process: subprocess.Popen[bytes], folder: Path, number: int) -> list[Entry]:
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(starts := [entry for entry in _entries(folder) if entry.start]) < number:
        assert process.poll() is None, (folder / "output.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return starts


def _ray_processes(mark: str) -> list[int]:
    """Return the processes of the ranks that Ray has started, in the order in which they began."""
    done = subprocess.run(["pgrep", "-f", RAY_PROCESS], capture_output=True, text=True, check=False)
    pids = [int(pid) for pid in done.stdout.split()]
    return [pid for pid in pids if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    rounds = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
            rounds.append(measure(Path(folder), options.workers))
        for title, start in zip(("start", "restart"), rounds[-1], strict=True):
            phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.phases.items())
            print(
                f"{number + 1} {title:8} {start.seconds:5.1f} s  load {os.getloadavg()[0]:4.1f}  ({phases})",
                flush=True,
            )
    for title, starts in zip(("start", "restart"), zip(*rounds, strict=True), strict=True):
        print(f"median {title:8} {statistics.median(start.seconds for start in starts):.1f} s")


if __name__ == "__main__":
    main()
