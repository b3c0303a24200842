"""The whole program on Ray: interrupted, killed, and continued to its end. Every trial is the run that `train` makes."""

from __future__ import annotations

import collections
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from tests.paths import ROOT

SECONDS = 280  # an upper limit for one start on a busy machine
LENGTHS = (
    "train.length=40 steps",
    "train.eval_every=5 steps",
    "train.log_every=5 steps",
    "train.figures=none",
)
SETS = [word for text in LENGTHS for word in ("--set", text)]
WORDS = [
    "sweep",
    "jobs/digits.py",
    "--search",
    "optim.lr=log:0.01..3",
    "--search",
    "model.name=resnet8,resnet14",
]
WORDS += ["--trials", "4", "--scheduler", "asha", *SETS]


def sweep(output: Path, *words: str, at: str = "", number: signal.Signals | None = None) -> tuple[int, str]:
    """Run a sweep to its end, or send it a signal at the line that matches `at`; return its exit code and its lines."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "resnet_dist", *(words or WORDS), "--output", str(output)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if number is not None and re.search(at, line):
                process.send_signal(number)
                number = None
        return process.wait(SECONDS), "".join(lines)


def runs_of(output: Path) -> dict[str, mlflow.entities.Run]:
    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    experiments = [found.experiment_id for found in client.search_experiments()]
    found = {run.info.run_name: run for run in client.search_runs(experiments)}
    for run in found.values():
        losses = collections.Counter(
            metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")
        )
        assert not losses or max(losses.values()) == 1  # Every step was logged once.
    return found


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_sweep_survives_an_interruption_and_a_kill(tmp_path: Path) -> None:
    code, text = sweep(tmp_path, at=r"-\d+: step 10 ", number=signal.SIGINT)
    assert code == 130, text
    assert "this continues it:\n  resnet-dist sweep jobs/digits.py" in text
    interrupted = runs_of(tmp_path)
    assert {run.info.status for run in interrupted.values()} <= {"KILLED", "FINISHED"}
    assert interrupted["digits-sweep"].info.status == "KILLED"
    assert (
        len(interrupted) <= 4
    )  # No trial began after the interruption: two at a time, and one that had ended.

    code, text = sweep(tmp_path, at=r"-\d+: (resumed|step)", number=signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, text = sweep(tmp_path)
    assert code == 0, text
    assert "resumed at step" in text
    runs = runs_of(tmp_path)
    parent = runs.pop("digits-sweep")
    assert sorted(runs) == [f"digits-sweep-00{n}" for n in (1, 2, 3, 4)]
    assert parent.info.status == "FINISHED"
    for run in runs.values():
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        stopped = "resnet_dist.stopped" in run.data.tags
        assert run.info.status == ("KILLED" if stopped else "FINISHED")
    best = re.search(r"^best +resnet-dist (train .*)$", text, re.MULTILINE)
    assert best is not None
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {
        "figure.png",
        "runs.csv",
        "sweep.json",
    }


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_trial_of_two_ranks_trains_on_the_ray_of_the_sweep(tmp_path: Path) -> None:
    words = ["sweep", "jobs/digits.py", "--search", "optim.lr=0.1,0.2", "--trials", "2", "--workers", "2"]
    lengths = ["--set", "train.length=4 steps", "--set", "train.figures=none", "--set", "model.name=resnet8"]
    code, text = sweep(tmp_path, *words, *lengths)
    assert code == 0, text
    assert text.count("starting Ray on this machine") == 1
    assert "2 trials, 1 at a time" in text
    for number in (1, 2):
        ranks = json.loads((tmp_path / f"runs/digits-sweep-00{number}/ranks.json").read_text())
        assert len(ranks["hosts"]) == 2
