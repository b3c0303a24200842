"""The same loop under torchrun: a run, mistakes, a failing rank, an interruption, restarts, and no Ray or MLflow."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from resnet_dist.train.checkpoint.folder import read_checkpoint
from tests.paths import ROOT, list_checkpoints

DIGITS = str(ROOT / "jobs/digits.py")
SHORT = [
    "--set",
    "model.name=resnet8",
    "--set",
    "train.length=24 steps",
    "--set",
    "train.checkpoint_every=4 steps",
]


@pytest.fixture
def folder(tmp_path: Path, digits_data: Path) -> Path:
    shutil.copytree(digits_data, tmp_path / "output/data/digits")
    return tmp_path


def start(
    folder: Path, *arguments: str, torchrun: tuple[str, ...] = (), hide: str = "", sabotage: str = ""
) -> subprocess.Popen[str]:
    """Start `torchrun --nproc-per-node 2 -m resnet_dist`.

    hide: names of modules that cannot be imported. sabotage: Python code that every rank runs first.
    """
    site = folder / "site"
    site.mkdir(exist_ok=True)
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in hide.split())
    (site / "sitecustomize.py").write_text(f"import os, sys\n{hidden}{sabotage}")
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT)])
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *torchrun]
    return subprocess.Popen(
        [*program, "-m", "resnet_dist", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *arguments: str, **options: object) -> tuple[int, str, str]:
    process = start(folder, *arguments, **options)  # type: ignore[arg-type]
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def exit_codes(err: str) -> list[int]:
    """Return the exit codes of all ranks that failed, as torchrun lists them."""
    return [int(code) for code in re.findall(r"exitcode +: (-?\d+)", err)]


@pytest.mark.long
def test_a_run_and_its_continuation(folder: Path) -> None:
    code, out, err = run(folder, "train", DIGITS, "--name", "x", *SHORT)
    assert code == 0, err
    assert out.count("2 rank(s)") == 1
    assert out.count("top-1  ") == 1
    client = mlflow.MlflowClient(f"sqlite:///{folder}/output/mlflow.db")
    (found,) = client.search_runs(["1"])
    assert found.info.status == "FINISHED"
    assert [m.step for m in client.get_metric_history(found.info.run_id, "train/loss")] == [10, 20, 24]


@pytest.mark.long
def test_without_ray_and_mlflow_the_spool_holds_the_metrics(folder: Path) -> None:
    code, out, err = run(folder, "train", DIGITS, "--name", "x", *SHORT, hide="ray mlflow sklearn webdataset")
    assert code == 0, err
    assert f"MLflow is not installed: metrics go to {folder}/output/runs/x/spool.jsonl alone" in out
    assert "step 24/24" in out
    lines = [json.loads(line) for line in (folder / "output/runs/x/spool.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line.get("metrics", {})] == [10, 20, 24]


@pytest.mark.long
def test_other_commands_are_refused(folder: Path) -> None:
    """Each rank would do all the work of the command."""
    code, out, err = run(folder, "study", str(ROOT / "jobs/plain_vs_residual.py"))
    assert code == 1  # This is torchrun's own code.
    assert (out + err).count("error: torchrun would study once per rank") == 1, out + err
    assert 2 in exit_codes(err)
    assert not (folder / "output/runs").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2"], "--workers: torchrun has started"),
        (["--address", "auto"], "--address: torchrun has started"),
        (["--set", "optim.lrr=1"], "--set optim.lrr: not a field of the recipe; did you mean optim.lr?"),
        (["--gpu"], "2 ranks on this machine, which has 0 CUDA"),
        (["--no-such-flag"], "No such option"),
    ],
)
def test_a_mistake_is_reported_once_and_all_ranks_exit_2(
    folder: Path, arguments: list[str], message: str
) -> None:
    code, out, err = run(folder, "train", DIGITS, *arguments)
    assert code == 1  # This is torchrun's own code.
    assert (out + err).count(message) == 1, out + err
    assert "resnet_dist/" not in err  # There is no traceback of ours.
    # 2 is the mistake; torchrun may end a rank by SIGTERM before it has read the command.
    assert set(exit_codes(err)) <= {2, -15, 130}, err
    assert 2 in exit_codes(err)
    assert not (folder / "output/runs").exists()


FAIL = """
if os.environ.get("RANK") == "1" and {when}:
    from resnet_dist.data.batches.loader import Loader
    batch_at = Loader.batch_at
    def fail(self, step):
        if step == 14:
            {how}
        return batch_at(self, step)
    Loader.batch_at = fail
"""


@pytest.mark.long
def test_a_failing_rank_ends_all_and_is_reported_once(folder: Path) -> None:
    sabotage = FAIL.format(when="True", how="raise MemoryError('no more')")
    code, out, err = run(folder, "train", DIGITS, "--name", "x", *SHORT, sabotage=sabotage)
    assert code == 1
    assert (out + err).count("rank 1 ran out of host memory (no more): lower data.prefetch_bytes=") == 1, err
    assert "resnet_dist/" not in err
    client = mlflow.MlflowClient(f"sqlite:///{folder}/output/mlflow.db")
    (found,) = client.search_runs(["1"])
    assert found.info.status in ("FAILED", "KILLED")  # KILLED where torchrun's SIGTERM arrived first.
    assert list_checkpoints(folder / "output/runs/x/checkpoints")


@pytest.mark.long
def test_max_restarts_continues_the_same_run(folder: Path) -> None:
    """A rank is killed by SIGKILL; the command has no --name, and yet it resumes its run."""
    sabotage = FAIL.format(
        when="os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'", how="os.kill(os.getpid(), 9)"
    )
    code, out, err = run(folder, "train", DIGITS, *SHORT, torchrun=("--max-restarts", "2"), sabotage=sabotage)
    assert code == 0, err
    assert re.search(r"resumed at step (4|8|12) of 24", out), out
    (name,) = os.listdir(folder / "output/runs")
    whole_code, _, err = run(folder, "train", DIGITS, "--name", "whole", *SHORT)
    assert whole_code == 0, err
    ours, theirs = (
        read_checkpoint(folder / f"output/runs/{each}/checkpoints/step-00000024")[1]["sha256"]
        for each in (name, "whole")
    )
    assert ours == theirs
    client = mlflow.MlflowClient(f"sqlite:///{folder}/output/mlflow.db")
    for found in client.search_runs(["1"]):
        assert found.info.status == "FINISHED"
        assert [m.step for m in client.get_metric_history(found.info.run_id, "train/loss")] == [10, 20, 24]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(folder: Path, number: signal.Signals) -> None:
    arguments = [*SHORT[:2], "--set", "train.length=6000 steps"]
    process = start(folder, "train", DIGITS, "--name", "x", *arguments)
    assert process.stdout is not None
    while "step 20/6000" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert err.count("interrupted at step") == 1, out + err
    line = "torchrun --nproc-per-node 2 -m resnet_dist train .*digits.py .*'train.length=6000 steps' --name x"
    assert re.search(line, err), err
    client = mlflow.MlflowClient(f"sqlite:///{folder}/output/mlflow.db")
    (found,) = client.search_runs(["1"])
    assert found.info.status == "KILLED"
    assert list_checkpoints(folder / "output/runs/x/checkpoints")
