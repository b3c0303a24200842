"""The sentences of a real cluster: it requires a token, its nodes lack this package, and its ports are exchanged."""

from __future__ import annotations

import os
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.ray_cluster.servers import free_port
from tests.paths import ROOT

PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
# A loopback address that no other head on this machine is likely to use.
HOST = "127.0.0.9"


@dataclass(frozen=True)
class Head:
    gcs: str
    client: str
    dashboard: str
    token: dict[str, str]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """Yield a cluster whose Python cannot import this package."""
    token, block = tmp_path / "token", tmp_path / "block"
    token.write_text(secrets.token_hex(32))
    block.mkdir()
    (block / "resnet_dist.py").write_text("raise ModuleNotFoundError(\"No module named 'resnet_dist'\")")
    with_token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    gcs, client, dashboard, agent = (free_port() for _ in range(4))
    command = (
        f"{sys.executable} -m ray.scripts.scripts start --head --block --num-cpus 2 --disable-usage-stats --port {gcs} "
        f"--node-ip-address {HOST} --dashboard-port {dashboard} --ray-client-server-port {client} "
        f"--dashboard-agent-listen-port {agent}"
    )
    # The path of a socket, which Ray puts there, must be short.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        process = subprocess.Popen(
            shlex.split(command),
            cwd="/",
            env={**PLAIN, **with_token, "PYTHONPATH": str(block), "RAY_TMPDIR": short},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        url = f"http://127.0.0.1:{dashboard}"
        try:
            # The client server is the last to start.
            while not (requires_token(url) and listens(client)):
                assert process.poll() is None
                time.sleep(0.2)
            yield Head(f"{HOST}:{gcs}", f"{HOST}:{client}", url, with_token)
        finally:
            process.terminate()
            process.wait(60)


def requires_token(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=2).close()
    except urllib.error.HTTPError as refusal:
        with refusal:
            return refusal.code == 401
    except OSError:
        return False
    raise AssertionError("the dashboard requires no token")


def listens(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex((HOST, port)) == 0


def refusal(folder: Path, command: str, environment: dict[str, str]) -> str:
    """Return what `resnet-dist` prints where it refuses an address before anything has started."""
    words = [sys.executable, "-m", "resnet_dist", *shlex.split(command), "--set", "train.length=4 steps"]
    done = subprocess.run(
        words,
        cwd=folder,
        env={**PLAIN, "PYTHONPATH": str(ROOT), "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 2, output
    assert "Traceback" not in output
    assert not list((folder / "output/runs").glob("*")), output
    return output


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_real_cluster_is_called_what_it_is(tmp_path: Path, head: Head) -> None:
    recipe = str(ROOT / "jobs/digits.py")

    def one_line(command: str, environment: dict[str, str]) -> str:
        output = refusal(
            tmp_path, f"{command.split()[0]} {recipe} {' '.join(command.split()[1:])}", environment
        )
        assert output.count("\n") == 1, output
        assert output.startswith("error: --address ")
        return output

    for target in (head.dashboard.removeprefix("http://"), head.dashboard):
        assert "the dashboard of a Ray cluster answers there" in one_line(f"train --address {target}", {})
    for target in (head.client, f"ray://{head.client}"):
        assert "Ray's client server answers there" in one_line(f"train --address {target}", head.token)
    for command in (
        f"train --address {head.gcs}",
        f"submit --address {head.gcs}",
        f"submit --address {head.dashboard}",
    ):
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in one_line(command, {})
        wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        assert "refuses the token of this shell (of RAY_AUTH_TOKEN)" in one_line(command, wrong)
