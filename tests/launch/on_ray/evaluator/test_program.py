"""Whole programs: evaluations beside training, whose process is killed, and whose driver is interrupted."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import psutil
import pytest

from tests.launch.on_ray.test_launcher import start
from tests.paths import ROOT

pytestmark = pytest.mark.long
STEPS = [12, 24, 36, 48]
WAIT_SECONDS = 150


def wait_for(sign: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not sign():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def evaluators(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::Evaluator" in " ".join(process.info["cmdline"] or ()) and os.getsid(process.pid) == session:
            found.append(process)
    return found


@pytest.mark.timeout(900)
def test_killed_and_interrupted_each_step_is_evaluated_once(digits_data: Path, tmp_path: Path) -> None:
    settings = {
        "data.train": f"{digits_data}/train",
        "data.eval": f"{digits_data}/eval",
        "data.source": "null",
        "model.name": "resnet8",
        "train.length": "48 steps",
        "train.log_every": "4 steps",
        "train.eval_every": "12 steps",
        "train.checkpoint_every": "0 steps",
        "train.keep_checkpoints": "1",
        "train.best_metric": "eval/loss",
        "train.evaluate": "beside",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    # Two CPUs: one for the rank, one for the evaluations, whatever this machine has.
    command = [sys.executable, "-m", "resnet_dist", "train", str(ROOT / "jobs/digits.py"), *words]
    command += ["--workers", "1", "--cpu", "--name", "x"]
    run = tmp_path / "output/runs/x"
    first = start(command, tmp_path)
    try:
        wait_for(lambda: first.poll() is not None or evaluators(first.pid), "no evaluator")
        for process in evaluators(first.pid):
            process.kill()
        wait_for(
            lambda: first.poll() is not None or (run / "beside/step-00000012.json").exists(), "no result"
        )
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=WAIT_SECONDS)
    finally:
        first.kill()
    assert first.returncode in (0, 130), err
    second = start(command, tmp_path)
    out, err = second.communicate(timeout=WAIT_SECONDS)
    assert second.returncode == 0, (out, err)
    assert "of 360 held-out samples" in out
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/output/mlflow.db")
    (found,) = client.search_runs(["1"])
    points = client.get_metric_history(found.info.run_id, "eval/loss")
    assert sorted(point.step for point in points) == STEPS
    lines = [line for line in (run / "spool.jsonl").read_text().splitlines() if "eval/loss" in line]
    assert len(lines) == len(STEPS)
    best = min(points, key=lambda point: (point.value, point.step)).step
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {f"step-{best:08d}", f"step-{STEPS[-1]:08d}"}
    # Beside the references to checkpoints there is one whole model.
    (model,) = [one for one in client.search_logged_models(["1"]) if one.name == "model"]
    steps = {one.model_id: one.step for one in found.outputs.model_outputs}
    assert steps[model.model_id] == best
