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
from resnet_dist.tracking.mlflow.ui import serve_store


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    client.create_experiment("digits", artifact_location=tmp_path.as_uri())
    return tmp_path


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
