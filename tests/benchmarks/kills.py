"""Kill a digits run at random instants, resume it by the same command, and compare it with an uninterrupted run.

    python tests/benchmarks/kills.py --kills 20 --seed 0 --ranks 2 --launcher torchrun

The instants are uniform over the time of a whole run, from the start of the command to its exit: imports, joining,
training, evaluating, writing checkpoints, uploading. The victim is the command itself or one of its ranks. A run that
reaches its end is compared, and the next one starts, until all kills are used. Weights, optimizer and sums must be
equal bit for bit, and MLflow must hold every metric once. It prints a table, and exits with 1 on any difference.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Set it before the import of mlflow, which reads it.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow
import torch

from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.train.checkpoint.folder import MANIFEST, read_checkpoint
from tests.paths import ROOT, list_checkpoints

EXIT_SECONDS = 120  # limit for a command to end by itself after its rank was killed
ORPHAN_SECONDS = 20.0  # limit for ranks to end by themselves after their command was killed
OVERRIDES = {
    "train.length": "60 steps",
    "train.eval_every": "20 steps",
    "train.checkpoint_every": "4 steps",
    "train.best_metric": "eval/top1",
    "train.log_every": "3 steps",
}
Histories = dict[str, list[tuple[int, float]]]


@dataclass(frozen=True)
class Setup:
    """The command that is run and killed, and the folder of its output."""

    folder: Path
    launcher: str
    ranks: int
    overrides: dict[str, str] = field(default_factory=lambda: dict(OVERRIDES))

    def command(self, name: str) -> list[str]:
        python = [sys.executable, "-m"]
        program = {
            "local": [*python, "resnet_dist", "train"],
            "ray": [*python, "resnet_dist", "train"],
            "torchrun": [
                *[*python, "torch.distributed.run", "--nproc-per-node", str(self.ranks)],
                *["-m", "resnet_dist", "train"],
            ],
        }[self.launcher]
        flags = {"local": ["--local"], "ray": ["--workers", str(self.ranks)], "torchrun": []}[self.launcher]
        sets = [f"--set={key}={value}" for key, value in self.overrides.items()]
        return [*program, str(ROOT / "jobs/digits.py"), "--name", name, "--cpu", *flags, *sets]

    def start(self, name: str) -> subprocess.Popen[bytes]:
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_TRACKING"))
        }
        environment["PYTHONPATH"] = str(ROOT)
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(name), cwd=self.folder, env=environment, stdout=log, stderr=log
            )

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")


@dataclass(frozen=True)
class Kill:
    number: int
    run: str
    seconds: float  # since the start of the command
    victim: str
    checkpoint: str  # the newest one at that instant
    writing: bool  # True while a checkpoint was being written
    exit_code: int


def kill_and_compare(
    setup: Setup, *, kills: int, seed: int, report: bool = True
) -> tuple[list[Kill], list[str]]:
    """Return all kills, and every difference from the uninterrupted run."""
    rng = random.Random(seed)
    prepare(open_source("digits"), setup.folder / "output/data/digits")
    begin = time.monotonic()
    whole = setup.start("whole")
    if whole.wait() != 0:
        raise SystemExit(f"the uninterrupted run failed:\n{setup.log('whole')}")
    duration = time.monotonic() - begin
    if report:
        print(f"uninterrupted: {duration:.1f} s, {setup.ranks} rank(s), {setup.launcher}", flush=True)
    done: list[Kill] = []
    differences: list[str] = []
    number = 0
    while len(done) < kills:
        number += 1
        name = f"killed-{number}"
        for kill in _run_to_the_end(
            setup, name, rng, duration, first=len(done) + 1, max_kills=kills - len(done)
        ):
            done.append(kill)
            if report:
                writing = " (writing one)" if kill.writing else ""
                print(
                    f"{kill.number:>4}  {kill.run:<10} {kill.seconds:6.2f} s  {kill.victim:<14} "
                    f"after {kill.checkpoint}{writing}, exit {kill.exit_code}",
                    flush=True,
                )
        found = compare(setup.folder, "whole", name)
        differences += found
        if report:
            print(f"      {name}: {'equal' if not found else '; '.join(found)}", flush=True)
    return done, differences


def _run_to_the_end(
    setup: Setup, name: str, rng: random.Random, duration: float, *, first: int, max_kills: int
) -> Iterator[Kill]:
    """Start the same command until it ends by itself, and yield each kill, at most `max_kills` of them."""
    killed = 0
    while True:
        process = setup.start(name)
        try:
            if killed < max_kills and _runs_for(process, seconds := rng.uniform(0, duration)):
                checkpoints = setup.folder / f"output/runs/{name}/checkpoints"
                newest = next((path.name for path in reversed(list_checkpoints(checkpoints))), "none")
                writing = any(checkpoints.glob(".step-*.partial"))
                victim = _kill_one(process, rng)
                if victim is not None:
                    killed += 1
                    yield Kill(first + killed - 1, name, seconds, victim, newest, writing, process.returncode)
                    continue
            if (code := process.wait()) != 0:
                raise SystemExit(f"{name} ended with {code}:\n{setup.log(name)}")
            return
        finally:
            _end(process)


def _runs_for(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def _kill_one(process: subprocess.Popen[bytes], rng: random.Random) -> str | None:
    """Kill the command or one of its ranks, by its process id, and wait for the command to end.

    Return the name of the victim, or None where it had ended by itself before.
    """
    family = _descendants(process.pid)
    ranks = [member for member in family if member.is_rank()]
    victim = rng.choice([None, *ranks])
    if victim is None:
        process.kill()
    was_alive = victim is None or victim.kill()
    try:
        process.wait(EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"the command did not end {EXIT_SECONDS} s after its rank was killed") from None
    # End the orphans of a killed launcher, as a scheduler would.
    for orphan in _alive_after(family, ORPHAN_SECONDS):
        orphan.kill()
    assert not _alive_after(family, ORPHAN_SECONDS)
    if victim is None:
        return "command" if process.returncode == -signal.SIGKILL else None
    return f"rank {victim.pid}" if was_alive else None


@dataclass(frozen=True)
class Member:
    """A process that the command started. Its start time distinguishes it from a later process of the same id."""

    pid: int
    parent: int
    start: str

    @classmethod
    def of(cls, pid: int) -> Member | None:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else cls(pid, int(fields[1]), fields[19])

    def is_rank(self) -> bool:
        try:
            arguments = Path(f"/proc/{self.pid}/cmdline").read_text().split("\0")
        except OSError:
            return False
        # torchrun starts a rank as `-m resnet_dist`; Ray names the process of a Train worker RayTrainWorker.
        return "resnet_dist" in arguments or any("RayTrainWorker" in argument for argument in arguments)

    def is_alive(self) -> bool:
        now = Member.of(self.pid)
        return now is not None and now.start == self.start

    def kill(self) -> bool:
        """Kill the process, and report whether it was still alive."""
        try:
            if self.is_alive():
                os.kill(self.pid, signal.SIGKILL)
                return True
        except ProcessLookupError:
            pass
        return False


def _descendants(root: int) -> list[Member]:
    """Return all processes that descend from the process `root`."""
    everyone = [
        member for path in Path("/proc").glob("[0-9]*") if (member := Member.of(int(path.name))) is not None
    ]
    known, found = {root}, []
    while new := [member for member in everyone if member.parent in known and member not in found]:
        found += new
        known |= {member.pid for member in new}
    return found


def _alive_after(family: list[Member], seconds: float) -> list[Member]:
    """Wait until all of `family` have ended, for at most `seconds`, and return those still alive."""
    deadline = time.monotonic() + seconds
    while (alive := [member for member in family if member.is_alive()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def compare(folder: Path, whole: str, other: str) -> list[str]:
    """Return the differences of two finished runs, in the tensors of the last checkpoint and the metrics in MLflow."""
    differences = []
    ours, theirs = (_last_tensors(folder / f"output/runs/{name}/checkpoints") for name in (whole, other))
    if ours.keys() != theirs.keys():
        differences.append(f"{other}: other tensors")
    differences += [
        f"{other}: {name}" for name in ours if name in theirs and not torch.equal(ours[name], theirs[name])
    ]
    expected, got = _metrics(folder, whole), _metrics(folder, other)
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            differences.append(f"{other}: metric {name}: {got.get(name)} instead of {expected.get(name)}")
    return differences


def _last_tensors(checkpoints: Path) -> dict[str, torch.Tensor]:
    folder = list_checkpoints(checkpoints)[-1]
    tensors, manifest = read_checkpoint(folder)
    assert json.loads((folder / MANIFEST).read_bytes())["sha256"]
    scalars = {name: manifest["scalars"][name] for name in ("step", "best", "bad_samples")}
    flat = {f"{file}/{name}": value for file, group in tensors.items() for name, value in group.items()}
    return {**flat, "scalars": torch.frombuffer(bytearray(json.dumps(scalars).encode()), dtype=torch.uint8)}


def _metrics(folder: Path, name: str) -> Histories:
    """Return (step, value) of every metric but those of speed, in the order of steps, with any duplicates."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/output/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
    assert len(runs) == 1, f"{len(runs)} runs named {name}"
    assert runs[0].info.status == "FINISHED", runs[0].info.status
    return {
        key: sorted(
            (metric.step, metric.value) for metric in client.get_metric_history(runs[0].info.run_id, key)
        )
        for key in runs[0].data.metrics
        if not key.startswith(("perf/", "system/"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--launcher", choices=("local", "torchrun", "ray"), default="local")
    parser.add_argument(
        "--steps", type=int, default=60, help="with more steps, more kills fall into the training"
    )
    options = parser.parse_args()
    if options.launcher == "local" and options.ranks != 1:
        parser.error("--launcher local trains as one rank; use torchrun or ray for more")
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    overrides = {**OVERRIDES, "train.length": f"{options.steps} steps"}
    setup = Setup(folder, options.launcher, options.ranks, overrides)
    kills, differences = kill_and_compare(setup, kills=options.kills, seed=options.seed)
    ranks = sum(kill.victim != "command" for kill in kills)
    runs = len({kill.run for kill in kills})
    print(
        f"{len(kills)} kills in {runs} runs ({ranks} of a rank, {len(kills) - ranks} of the command, "
        f"{sum(kill.writing for kill in kills)} while a checkpoint was written): {len(differences)} differences"
    )
    if differences:
        print("\n".join(differences), f"\nlogs are in {folder}", sep="\n")
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
