"""A run is RUNNING only while its driver lives: the next command that looks closes it, and disturbs no other."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import mlflow
import pytest

from resnet_dist.cli.main import run_command
from resnet_dist.config import Recipe
from resnet_dist.runs.folder import RunFolder, read_run, stored_recipe
from resnet_dist.runs.group_folder import SWEEP_TAG, GroupFolder, held
from resnet_dist.runs.storage.holder import Holder
from resnet_dist.runs.storage.lease import LEASE_FILE, is_abandoned
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.abandoned import close_abandoned, closing_abandoned, closing_beside_group
from resnet_dist.tracking.mlflow.reading import Tracker
from resnet_dist.tracking.mlflow.run import MlflowRun
from resnet_dist.tracking.protocol import GroupRecord, RunRecord
from resnet_dist.tracking.spool import Spool
from tests.paths import ROOT


def begun(
    output: Path, recipe: Recipe, name: str, pid: int, host: str = "", tags: dict[str, str] | None = None
) -> RunFolder:
    """Begin a run, in its folder and in MLflow, as the driver with this process did, and log one step."""
    run = RunFolder(
        open_storage(output / "runs" / name), name, None, 1, stored_recipe(recipe), key=name, tracker=""
    )
    run = run.with_tags(tags or {})
    run.write()
    holder = Holder.this_process()
    machine = holder.process.rpartition(" ")[0].rpartition(" ")[0]
    process = holder.process if pid == os.getpid() else f"{machine} {pid} 1"
    process = "elsewhere 1 1" if host else process
    holder = dataclasses.replace(holder, pid=pid, process=process, host=host or holder.host)
    run.storage.write(LEASE_FILE, holder.encode())
    with Spool(run.spool) as spool:
        spool.log({"train/loss": 0.5}, 1)
    opened = MlflowRun.open(RunRecord(run, recipe, output))
    run = run.with_run_id(opened.run_id)
    run.write()
    return run


def looked(output: Path) -> tuple[dict[str, str], list[str]]:
    """Look at the runs as a command does; return their states by name, and the lines for the person."""
    lines: list[str] = []
    tracker = Tracker.open(output)
    close_abandoned(tracker, output, lines.append)
    return {run.name: run.state for run in tracker.runs(tracker.experiments())}, lines


def test_only_runs_of_dead_drivers_are_closed(output: Path, digits_recipe: Recipe) -> None:
    dead, no_pid = begun(output, digits_recipe, "dead", 2**22), 2**22
    begun(output, digits_recipe, "alive", os.getpid())
    begun(output, digits_recipe, "remote", no_pid, host="h2")
    begun(output, digits_recipe, "ended", no_pid).ended("FAILED", ["the status"]).write()
    shutil.rmtree(begun(output, digits_recipe, "removed", no_pid).location)
    states, lines = looked(output)
    assert states == {
        "dead": "KILLED",
        "alive": "RUNNING",
        "remote": "RUNNING",
        "ended": "FAILED",
        "removed": "KILLED",
    }
    assert sorted(lines) == [
        "run dead: 1 metrics sent, closed as KILLED, was RUNNING",
        "run ended: closed as FAILED, was RUNNING",
        "run removed: closed as KILLED, was RUNNING; its folder was removed",
    ]
    recorded = read_run(dead.storage)
    assert recorded is not None
    assert recorded.status == "KILLED"
    # The next look finds nothing more to do, until the driver on the other machine gives no sign.
    assert looked(output)[1] == []
    lease, before = output / "runs/remote" / LEASE_FILE, time.time() - 600
    os.utime(lease, (before, before))
    assert looked(output)[1] == [
        "run remote: RUNNING, but its driver on another machine has given no sign for 10 min; `resnet-dist sync remote` "
        "closes it where it is dead"
    ]


def test_the_start_of_a_sweep_closes_them_but_its_own(output: Path, digits_recipe: Recipe) -> None:
    for name, tags in (("dead", None), ("s-001", {SWEEP_TAG: "s"})):
        begun(output, digits_recipe, name, 2**22, tags=tags)
        before = time.time() - 600
        os.utime(output / "runs" / name / LEASE_FILE, (before, before))
    record, publisher = GroupRecord(Mock(), "s", output / "sweeps/s", "digits.py", output), Mock()
    assert closing_beside_group(lambda record: publisher)(record) is publisher
    for thread in threading.enumerate():
        if thread.name == "abandoned":
            thread.join(60)
    found = [read_run(open_storage(output / "runs" / name)) for name in ("dead", "s-001")]
    assert [run.status for run in found if run is not None] == ["KILLED", None]


@pytest.mark.parametrize("minutes", [1, 6])
def test_the_start_of_another_run_closes_them(output: Path, digits_recipe: Recipe, minutes: int) -> None:
    """After its publisher is open: until then the run that begins could be the one that a dead driver left.

    It leaves a run whose driver has just died: what starts it again needs its lease.
    """
    dead = begun(output, digits_recipe, "dead", 2**22)
    before = time.time() - 60 * minutes
    os.utime(output / "runs/dead" / LEASE_FILE, (before, before))
    record = RunRecord(begun(output, digits_recipe, "new", os.getpid()), digits_recipe, output)
    publisher = Mock()
    assert closing_abandoned(lambda record, on_entry: publisher)(record, Mock()) is publisher
    for thread in threading.enumerate():
        if thread.name == "abandoned":
            thread.join(60)
    recorded = read_run(dead.storage)
    assert recorded is not None
    assert recorded.status == ("KILLED" if minutes > 5 else None)
    assert looked(output)[0] == {"dead": "KILLED", "new": "RUNNING"}


def test_a_folder_that_was_moved_is_found(output: Path, digits_recipe: Recipe) -> None:
    begun(output, digits_recipe, "dead", 2**22)
    moved = output.rename(output.with_name("moved"))
    assert looked(moved)[0] == {"dead": "KILLED"}


def test_a_machine_that_was_started_again_has_no_drivers_of_before(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    before = dataclasses.replace(Holder.this_process(), process="another boot 1 1")
    storage.write(LEASE_FILE, before.encode())
    assert is_abandoned(storage) is True
    with storage.lock("lock"):
        assert is_abandoned(storage) is False


def test_the_run_of_a_study_is_closed_with_it(output: Path) -> None:
    study = GroupFolder(output / "studies/s", key="s", experiment="e", tracker="")
    study.write()
    MlflowRun.open_parent(study)
    with held(study.path):
        assert looked(output)[0] == {"s": "RUNNING"}
    assert looked(output)[0] == {"s": "KILLED"}


@pytest.mark.long
def test_a_driver_that_was_killed(
    tmp_path: Path, digits_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its run is closed by `runs`, which lists it."""
    shutil.copytree(digits_data, tmp_path / "output/data/digits")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "resnet_dist", "train", str(ROOT / "jobs/digits.py"), "--local"]
    command += ["--name", "a", "--set", "model.name=resnet8", "--set", "train.log_every=1 steps"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert any(line.startswith("step 3/") for line in driver.stdout)
        driver.send_signal(signal.SIGKILL)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/output/mlflow.db")
    (found,) = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert found.info.status == "RUNNING"
    monkeypatch.setattr(sys, "argv", ["resnet-dist", "runs"])
    assert run_command() == 0
    out, err = capsys.readouterr()
    assert "closed as KILLED, was RUNNING" in err
    assert "KILLED" in out
    assert client.get_run(found.info.run_id).info.status == "KILLED"
