"""A small Ray head on this machine, with the commands that use it as a cluster."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.launch.ray_cluster.servers import free_port
from tests.paths import ROOT

PLAIN = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_"))}
HOST = "127.0.0.10"  # Another head on this machine is not likely to use it.
SECONDS = 400.0  # limit for each wait
STARTS = 3


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
        process = self._begin(shlex.split(command))
        try:
            yield process
        finally:
            _end(process)

    def _begin(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Return a head that answers; Ray gives its parts 30 s to begin, too few on a busy machine, so that it may end first."""
        log = self.folder / "head.log"
        for _ in range(STARTS):
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command, cwd="/", env=self.variables, stdout=file, stderr=file, start_new_session=True
                )
            try:
                wait_until(lambda process=process: process.poll() is not None or self._answers())  # type: ignore[misc]
            except BaseException:
                _end(process)
                raise
            if process.poll() is None:
                return process
        raise AssertionError(f"the head ended {STARTS} times: {log.read_text()[-2000:]}")

    def ask(self, path: str) -> str:
        """Return the answer of the dashboard."""
        request = urllib.request.Request(f"{self.url}{path}", headers=self._headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    @property
    def _headers(self) -> dict[str, str]:
        token = self.variables.get("RAY_AUTH_TOKEN")
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _answers(self) -> bool:
        try:
            self.ask("/api/jobs/")
        except OSError:
            return False
        return True

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


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(60)


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


@contextmanager
def small_head(home: Path, token: str = "") -> Iterator[Head]:
    """Yield a head that is not started. home: of all processes. token: who has it may use the cluster; empty: everybody."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        variables = {
            **PLAIN,
            "PYTHONPATH": str(ROOT),
            "RAY_TMPDIR": short,
            "RAY_AUTH_MODE": "token" if token else "disabled",
            # Under `uv run` Ray would pack the working folder of this head, which is /, for every job.
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }
        if token:
            variables["RAY_AUTH_TOKEN"] = token
        yield Head(home, (free_port(), free_port(), free_port(), free_port()), variables)
