"""`resnet-dist ui`: it ends all processes that it started, and reports a port that is in use."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow
import pytest

from resnet_dist.errors import UserError
from resnet_dist.tracking.mlflow import ui
from resnet_dist.tracking.mlflow.ui import serve_store


@pytest.fixture(autouse=True)
def experiment(output: Path) -> None:
    client = mlflow.MlflowClient(f"sqlite:///{output}/mlflow.db")
    client.create_experiment("digits", artifact_location=output.as_uri())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_in_use_is_reported_before_anything_starts(output: Path) -> None:
    reports: list[str] = []
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port {port}: cannot be used \(Address already in use\)"):
            serve_store(output, port, reports.append)
    assert reports == []


def test_a_server_of_the_environment_is_named_not_served(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://anna:hush@mlflow:5000")
    with pytest.raises(
        UserError, match="the runs are at http://mlflow:5000, as MLFLOW_TRACKING_URI says"
    ) as refused:
        serve_store(output, free_port(), lambda text: None)
    assert "hush" not in str(refused.value)


def test_a_database_of_the_environment_is_served(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address is printed before the server starts, which a command that fails stands for here."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{output}/mlflow.db")
    seen: list[dict[str, str]] = []

    class Server:
        pid = -1

        def __init__(self, command: list[str], env: dict[str, str], **options: object) -> None:
            seen.append({**env, "command": " ".join(command)})

        def __enter__(self) -> Server:
            return self

        def __exit__(self, *arguments: object) -> None:
            pass

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(ui.subprocess, "Popen", Server)
    monkeypatch.setattr(ui, "_end_group", lambda server: None)
    reports: list[str] = []
    assert serve_store(tmp_path / "elsewhere", free_port(), reports.append) == 0
    assert "/#/experiments/1/runs" in reports[0]
    assert seen[0]["MLFLOW_BACKEND_STORE_URI"] == f"sqlite:///{output}/mlflow.db"
    assert "sqlite" not in seen[0]["command"]  # Everybody on the machine can read it.


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_signal_ends_the_server_and_its_workers(output: Path, number: signal.Signals) -> None:
    port = free_port()
    command = [sys.executable, "-m", "resnet_dist", "ui", "--output", str(output), "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, text=True, **pipes)
    try:
        assert process.stdout is not None
        assert f"open http://127.0.0.1:{port}/#/experiments/1/runs" in process.stdout.readline()
        while not answers(port):
            assert process.poll() is None
            time.sleep(0.2)
        os.kill(process.pid, number)  # A terminal would signal the whole group.
        assert process.wait(60) == 0
        assert not answers(port)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
    except OSError:
        return False
    return True
