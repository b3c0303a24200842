"""The life of jobs on a small real cluster: submitted, listed, followed, stopped, resumed, killed, forgotten."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.launch.ray_cluster.servers import free_port
from tests.paths import ROOT

PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
HOST = "127.0.0.10"  # Another head on this machine is not likely to use it.
FLAGS = (
    "--workers=1",
    "--set=train.checkpoint_every=10 steps",
    "--set=model.name=resnet8",
    "--set=train.length=20000 steps",
)
SECONDS = 150.0  # limit for each wait


@dataclass
class Head:
    """A head with one CPU, which may be started again on the same ports, and commands that use it."""

    folder: Path
    ports: tuple[int, int, int, int]
    variables: dict[str, str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        gcs, dashboard, client, agent = self.ports
        command = (
            f"{sys.executable} -m ray.scripts.scripts start --head --block --num-cpus 1 --disable-usage-stats --port {gcs} "
            f"--node-ip-address {HOST} --dashboard-port {dashboard} --ray-client-server-port {client} "
            f"--dashboard-agent-listen-port {agent} --object-store-memory {2**27}"
        )
        process = subprocess.Popen(
            shlex.split(command),
            cwd="/",
            env=self.variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: process.poll() is None and answers(f"{self.url}/api/jobs/"))
            yield process
        finally:
            process.terminate()
            process.wait(60)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "resnet_dist", *words],
            cwd=self.folder,
            env={**self.variables, "RAY_API_SERVER_ADDRESS": self.url},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> tuple[int, str]:
        process = self.start(*words)
        output, _ = process.communicate(timeout=2 * SECONDS)
        return process.returncode, output


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def wait_until(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.3)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return what a command prints up to the line with `text`."""
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or text not in lines[-1]:
        line = process.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)
    return "".join(lines)


def descendants(process: int, name: str) -> list[int]:
    """Return the descendants of a process whose command line has `name`."""
    found = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(maxsplit=2) for line in found.splitlines()]
    family = {process}
    for _ in range(12):
        family |= {int(row[0]) for row in rows if int(row[1]) in family}
    return [int(row[0]) for row in rows if int(row[0]) in family and name in row[2]]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        variables = {
            **PLAIN,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": short,
            "RAY_AUTH_MODE": "disabled",
            # Under `uv run` Ray would pack the working folder of this head, which is /, for every job.
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "HOME": str(tmp_path),
            "OMP_NUM_THREADS": "1",
        }
        yield Head(tmp_path, (free_port(), free_port(), free_port(), free_port()), variables)


RECIPE = """
from beside import DATA
from digits import recipe as digits

def recipe():
    return digits().with_overrides([f"data.{split}={DATA}/{split}" for split in ("train", "eval")])
"""


@pytest.fixture
def mine(head: Head, digits_data: Path) -> Path:
    """A folder with a recipe, a module that it imports, and the shards that it names."""
    folder = head.folder / "mine"
    shutil.copytree(digits_data, folder / "data")
    shutil.copy(ROOT / "jobs/digits.py", folder)
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "beside.py").write_text("DATA = 'mine/data'")
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_life_of_jobs(head: Head, mine: Path) -> None:
    with head.running() as ray:
        submit = ("submit", str(mine / "recipe.py"), "--output", str(head.folder / "output"), *FLAGS)
        sent = ("--working-dir", str(mine), "--env", "MY_TOKEN=hush")
        code, printed = head.run(*submit, *sent, "--name", "first", "--detach")
        assert code == 0, printed
        assert "--env MY_TOKEN: Ray stores" in printed
        assert f" of {mine}" in printed
        assert f"  resnet-dist stop first --address {head.url}\n" in printed
        follower = head.start("logs", "first", "--follow")
        assert read_until(follower, "step 30/20000").startswith("run first: ")

        code, printed = head.run("jobs", "--json")
        (job,) = json.loads(printed)["jobs"]
        assert (code, job["run"], job["state"], job["total_steps"]) == (0, "first", "RUNNING", 20000)
        assert "hush" not in printed

        code, printed = head.run("stop", "first")
        assert code == 0, printed
        saved = printed.partition("saved step ")[2].split()[0]
        checkpoint = head.folder / f"output/runs/first/checkpoints/step-{int(saved):08d}"
        assert str(checkpoint) in printed
        assert checkpoint.is_dir()
        rest, _ = follower.communicate(timeout=SECONDS)
        assert follower.returncode == 130
        assert "was stopped by another command" in rest
        assert "Traceback" not in rest

        # The line that resumes names the variable without its value. Then the driver is killed.
        resume = [word for word in shlex.split(printed.splitlines()[-1]) if word != "--detach"]
        assert "MY_TOKEN" in resume
        head.variables["MY_TOKEN"] = "hush"
        client = head.start(*resume[1:])
        read_until(client, f"resumed at step {saved} of 20000")
        for pid in descendants(ray.pid, "-m resnet_dist train"):
            os.kill(pid, signal.SIGKILL)
        rest, _ = client.communicate(timeout=SECONDS)
        assert client.returncode == 1
        assert "the driver of run first was killed (SIGKILL" in rest
        assert head.run("status", "first")[0] == 1

        client = head.start(*submit, "--name", "second")
        read_until(client, "run second: ")
        for pid in descendants(ray.pid, ""):  # as a power cut ends them
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with head.running():
        rest, _ = client.communicate(timeout=SECONDS)
        assert client.returncode == 1, rest
        assert "its head was restarted, and has forgotten its jobs" in rest
        assert rest.rstrip().endswith("--name second")
