"""Messages of commands that are interrupted, cannot start, or refer the user to another command."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from resnet_dist import cli
from resnet_dist.cli.main import _report_error, _run
from resnet_dist.cli.training import ending
from resnet_dist.cli.training.ending import browse_line
from resnet_dist.config import Recipe
from resnet_dist.driver.request import Request
from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.choose import choose_run
from resnet_dist.runs.folder import RunFolder
from resnet_dist.system import command, limit
from resnet_dist.system.redact import redact
from resnet_dist.tracking.console import ConsolePublisher
from resnet_dist.tracking.mlflow.browse.view import VIEW, VIEW_TAG
from resnet_dist.tracking.open import open_group, open_publisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry
from tests.paths import JOBS
from tests.tracking.mlflow.servers import answering

STUDY = JOBS / "plain_vs_residual.py"
STRAY = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
RANK_0_OF_2 = STRAY | {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(
    ("words", "function"),
    [
        (["prepare", "digits", "out"], "data.prepare.split.prepare_splits"),
        (["index", "a.tar", "--out", "index.json"], "data.shards.names.expand"),
        (["study", str(STUDY)], "study.run.check_trials"),
        (
            ["submit", str(STUDY.with_name("digits.py")), "--address", "x"],
            "launch.ray_cluster.check.typed_address",
        ),
        (["evaluate", "model", "shards"], "data.shards.index.read_index"),
        (["bench", "loader", "shards"], "bench.loader.bench_loader"),
    ],
)
def test_an_interruption_is_reported(
    words: list[str], function: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    # A module that a command imports while this is in place would keep it after the test.
    importlib.import_module("resnet_dist.evaluation.report")
    monkeypatch.setattr(f"resnet_dist.{function}", interrupted)
    assert cli.app(words, standalone_mode=False) == 130
    message = capsys.readouterr().err
    assert message.startswith(("interrupted; the same command ", "interrupted before the job was submitted"))
    assert message.count("\n") == 1


@pytest.mark.long
def test_an_interrupted_prepare_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "resnet_dist", "prepare", "digits", "out", "--shards", "200"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, text=True, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("train: ")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (
        130,
        "interrupted; the same command resumes with what is not done yet\n",
    )
    assert not (tmp_path / "out/eval/index.json").exists()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out/eval/index.json").exists()


@pytest.mark.parametrize("command", ["study", "submit", "prepare", "bench"])
def test_torchrun_is_for_train_alone(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in RANK_0_OF_2.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"torchrun would {command} once per rank"):
        cli.app([command, "x"], standalone_mode=False)


def test_variables_that_torchrun_did_not_set_are_ignored(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in (STRAY | {"RANK": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["resnet-dist", "train", str(tmp_path / "gone.py"), "--local"])
    with mock.patch.dict(os.environ):  # The command drops the variables.
        assert _run() == 2
    ignored, error = capsys.readouterr().err.splitlines()
    assert ignored == (
        "ignored: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT in the environment, since torchrun did not "
        "start this process"
    )
    assert "gone.py: no such recipe file" in error  # It reports as rank 0 does.


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, "srun"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpirun"),
    ],
)
def test_one_command_started_several_times_is_refused(
    variables: dict[str, str], launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "isatty", lambda number: False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for words in (["train", str(JOBS / "digits.py"), "--local"], ["study", str(STUDY)]):
        with pytest.raises(UserError, match=f"{launcher} has started this command 2 times"):
            cli.app(words, standalone_mode=False)


def test_a_batch_script_of_slurm_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")  # the tasks of the job, outside srun
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    assert command.task_launcher() is None


def test_a_missing_gpu_is_reported(digits_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--gpu: this machine has no CUDA device"):
        cli.app(["evaluate", "model", str(digits_data / "eval"), "--gpu"], standalone_mode=False)


def test_storage_that_fails_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert _report_error(StorageError("https://x/a.tar: gone")) == 1
    assert capsys.readouterr().err == "error: https://x/a.tar: gone\n"


def test_where_the_runs_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(ending, "experiment_page", lambda *_: "")  # as of a server that does not answer
    assert browse_line(Path("output"), "digits") == "\nbrowse     resnet-dist ui"
    assert browse_line(Path("o"), "digits") == "\nbrowse     resnet-dist ui --output o"
    for uri, line in {
        "http://mlflow:5000": "http://mlflow:5000",  # A server has its own page.
        "http://anna:hush@mlflow:5000": "http://mlflow:5000",
        "sqlite:////srv/my runs.db": "MLFLOW_TRACKING_URI='sqlite:////srv/my runs.db' resnet-dist ui",
        "postgresql+psycopg2://anna:hush@host/db": "resnet-dist ui",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert browse_line(Path("output"), "digits") == f"\nbrowse     {line}"
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert browse_line(Path("output"), "digits") == ""


@pytest.mark.parametrize("tags", [[], [{"key": VIEW_TAG, "value": "{}"}]], ids=["plain", "view"])
def test_a_server_is_browsed_at_the_experiment_in_the_mode_for_training(
    monkeypatch: pytest.MonkeyPatch, tags: list[dict[str, str]]
) -> None:
    found = [
        {"experiment_id": number, "name": name, "tags": tags}
        for number, name in (("0", "Default"), ("7", "digits"))
    ]
    with answering(200, json.dumps({"experiments": found}).encode(), "application/json") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address.replace("://", "://anna:hush@"))
        view = f"&viewStateShareKey={VIEW}" if tags else ""
        page = f"{address}/#/experiments/7/runs?workflowType=machine_learning{view}"
        assert browse_line(Path("output"), "digits") == f"\nbrowse     {page}"
        assert browse_line(Path("output"), "other") == f"\nbrowse     {address}"
        assert redact(page) == page  # It is printed as it is.


def test_an_interruption_of_the_wait_for_a_server_loses_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float, function: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(limit, "within", interrupted)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert browse_line(Path("output"), "digits") == "\nbrowse     http://mlflow:5000"


@pytest.mark.parametrize("uri", ["localhost:5000", "./mlruns", "ftp://host"])
def test_a_wrong_tracker_is_refused_before_anything_is_made(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    output = tmp_path / "output"
    for name in ("train", "submit"):
        arguments = [
            name,
            str(JOBS / "digits.py"),
            "--address",
            "http://127.0.0.1:1",
            "--output",
            str(output),
        ]
        with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI={uri}: "):
            cli.app(arguments, standalone_mode=False)
    assert not output.exists()


def test_a_name_that_no_store_takes_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    arguments = ["train", str(JOBS / "digits.py"), "--local", "--output", str(tmp_path / "output")]
    with pytest.raises(UserError, match=r"experiment='e{40}…' has 501 characters; MLflow takes 500"):
        cli.app([*arguments, "--set", f"experiment={'e' * 501}"], standalone_mode=False)
    assert not (tmp_path / "output").exists()


def test_a_password_does_not_go_into_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:hush@mlflow:5000")
    arguments = ["submit", str(JOBS / "digits.py"), "--address", "http://127.0.0.1:1"]
    with pytest.raises(UserError, match="would see the password; leave it out of the address") as refused:
        cli.app(arguments, standalone_mode=False)
    assert "hush" not in str(refused.value)


def test_the_line_that_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*command.VARIABLES, command.COMMAND_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["", "train", "a b.py", "--resume", "--name", "old"])
    assert command.resume_advice("new") == "this continues it:\n  resnet-dist train 'a b.py' --name new"
    for name, value in (RANK_0_OF_2 | {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "0"}).items():
        monkeypatch.setenv(name, value)
    one_node = command.resume_advice("new").splitlines()
    assert one_node[0] == "this continues it:"
    assert shlex.split(one_node[1])[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "resnet_dist"]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "4")
    advice, line = command.resume_advice("new").splitlines()
    assert "on every node" in advice
    assert "--rdzv" in advice
    assert line.startswith("  torchrun --nnodes 3 --nproc-per-node 2 --max-restarts 4 -m resnet_dist train")


def record_of(request: Request, run: RunFolder) -> RunRecord:
    return RunRecord(run, request.recipe, request.output)


@pytest.fixture
def first_run(digits_recipe: Recipe, tmp_path: Path) -> tuple[Request, RunFolder]:
    request = Request(digits_recipe, "digits.py", tmp_path)
    return request, choose_run(tmp_path, digits_recipe, "first", resume=False)


def test_without_mlflow_the_spool_is_named(
    first_run: tuple[Request, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, run = first_run
    monkeypatch.setitem(sys.modules, "mlflow", None)
    reported: list[Entry] = []
    assert isinstance(open_publisher(record_of(request, run), reported.append), ConsolePublisher)
    assert [entry.note for entry in reported] == [f"MLflow is not installed: metrics go to {run.spool} alone"]
    with pytest.raises(UserError, match="MLflow, where the runs of a study lie together, is not installed"):
        open_group(record_of(request, run))  # type: ignore[arg-type]


def test_a_broken_mlflow_is_not_a_missing_one(
    first_run: tuple[Request, RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    request, run = first_run
    monkeypatch.setitem(sys.modules, "resnet_dist.tracking.mlflow.publisher", None)
    with pytest.raises(ImportError):
        open_publisher(record_of(request, run), lambda entry: None)
