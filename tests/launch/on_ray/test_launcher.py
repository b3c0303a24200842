"""Whole programs on a real Ray cluster: README's main command, an interruption, a failing rank, a submitted job."""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Run

from resnet_dist.config import Recipe, WorkerRange
from resnet_dist.errors import UserError
from resnet_dist.launch.on_ray.launcher import ray_launcher
from tests.paths import ROOT

COMMANDS = Path(sys.executable).parent
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))},
    "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
}


def start(command: list[str], cwd: Path, environment: dict[str, str] = ENVIRONMENT) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, start_new_session=True, **pipes)


def only_run(folder: Path) -> Run:
    client = mlflow.MlflowClient(f"sqlite:///{folder}/output/mlflow.db")
    (run,) = client.search_runs(["1"])
    return run


def main_command() -> list[str]:
    """Return README's first command, without the installation."""
    (line,) = re.findall(
        r"^ *pip install uv && uv run (resnet-dist train .*)$", (ROOT / "README.md").read_text(), re.M
    )
    return shlex.split(line.partition("#")[0])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_readmes_main_command(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    process = start(main_command(), tmp_path)
    out, err = process.communicate(timeout=350)
    assert process.returncode == 0, err
    assert err == ""  # Ray and MLflow print nothing of their own.
    assert "2 rank(s)" in out
    assert out.endswith("browse     resnet-dist ui\n")
    top1 = re.search(r"^top-1 +(\d+\.\d+)% of 360", out, re.M)
    assert top1 is not None
    assert float(top1[1]) >= 98.0
    run = only_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["eval/samples"] == 360
    checkpoint = re.search(r"^checkpoint (\S+)", out, re.M)
    assert checkpoint is not None
    assert (tmp_path / checkpoint[1] / "model.safetensors").exists()
    while processes_of(process.pid):
        # Ray's processes end by themselves; the timeout of the test catches those that do not.
        time.sleep(0.2)


def processes_of(session: int) -> str:
    done = subprocess.run(["pgrep", "-s", str(session)], capture_output=True, text=True, check=False)
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(900)
def test_ctrl_c_checkpoints_and_a_failing_rank_is_reported_once(tmp_path: Path, digits_data: Path) -> None:
    shutil.copytree(digits_data, tmp_path / "output/data/digits")
    command = [
        "resnet-dist",
        "train",
        str(ROOT / "jobs/digits.py"),
        "--name",
        "x",
        "--set",
        "train.length=9000 steps",
    ]
    process = start(command, tmp_path)
    assert process.stdout is not None
    while "step 10/9000" not in (line := process.stdout.readline()):
        assert line, process.communicate()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 130, err
    assert "interrupted at step" in err
    assert only_run(tmp_path).info.status == "KILLED"
    assert list((tmp_path / "output/runs/x/checkpoints").glob("step-*"))

    for shard in (tmp_path / "output/data/digits/train").glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"\x89PNG", b"JUNK"))
    process = start(command, tmp_path)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "resumed at step" in out
    assert len(re.findall("max_bad_fraction", out + err)) == 1
    assert only_run(tmp_path).info.status == "FAILED"


def test_an_empty_ray_address_means_this_machine(
    monkeypatch: pytest.MonkeyPatch, digits_recipe: Recipe
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    notes: list[str] = []
    with (
        pytest.raises(UserError, match="this machine has"),
        ray_launcher(
            digits_recipe,
            workers=WorkerRange.exactly(1_000),
            gpu=True,
            address=None,
            wait_seconds=None,
            report=notes.append,
        ),
    ):
        pass
    assert notes == ["starting Ray on this machine"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def head(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the dashboard address of a Ray head with token authentication, and the environment of its users."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environment = {
        **ENVIRONMENT,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    port = free_port()
    command = f"ray start --head --block --port {free_port()} --dashboard-port {port} --num-cpus 2"
    # Use a loopback address that no other head on this machine is likely to use.
    command += " --node-ip-address 127.0.0.2 --disable-usage-stats"
    address = f"http://127.0.0.1:{port}"
    # Ray puts sockets into this folder, and the path of a socket must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        process = start([*shlex.split(command), "--temp-dir", short], tmp_path, environment)
        try:
            while not answers(address):
                assert process.poll() is None, process.communicate()
                time.sleep(0.2)
            yield address, environment
        finally:
            process.terminate()
            process.communicate(timeout=60)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2).close()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code == 401  # The head runs and requires the token.
    except OSError:
        return False
    return True


@pytest.mark.long
@pytest.mark.timeout(900)
def test_submit_to_a_real_head(tmp_path: Path, head: tuple[str, dict[str, str]]) -> None:
    address, environment = head
    recipe = str(ROOT / "jobs/digits.py")
    command = ["resnet-dist", "submit", recipe, "--address", address, "--set", "train.length=20 steps"]
    process = start(command, tmp_path, environment)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    assert err == ""
    assert "step 20/20" in out  # The log was followed to its end.
    run = only_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.length"] == "20 steps"
    assert len(run.data.tags["mlflow.source.git.commit"]) >= 40

    process = start([*command, "--workers", "2", "--gpu"], tmp_path, environment)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2, out + err  # This is the exit code of the job.
    assert "each needs one CPU and one GPU" in out

    process = start([*command, "--workers", "3"], tmp_path, environment)
    assert process.communicate(timeout=200)[1].startswith("error: --workers 3")
    assert process.returncode == 2

    process = start(command, tmp_path, {**environment, "RAY_AUTH_MODE": "disabled"})
    out, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert err.startswith(
        f"error: --address {address}: that cluster requires a token; set RAY_AUTH_MODE=token"
    )
