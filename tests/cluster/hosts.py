"""Hosts on one machine, as network namespaces: each with an address, a host name, processes, and a link to cut.

Needs root and iproute2. Everything that is started in a host ends with it, by pid, also where a test fails.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

END_SECONDS = 10.0  # for processes to end after SIGTERM


def why_not() -> str | None:
    """Return why this machine cannot make hosts, or None."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if shutil.which("ip") is None:
        return "needs iproute2 (`ip`), to make network namespaces"
    done = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, check=False)
    return None if done.returncode == 0 else "needs a kernel that allows network namespaces"


needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@dataclass
class Host:
    """One host: its processes see only its own network, and other hosts by name and address."""

    name: str
    address: str
    namespace: str
    link: str  # the end of its cable that lies in the switch
    folder: Path  # its working folder
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, log: str = "log"
    ) -> subprocess.Popen[str]:
        """Start a command in the host's folder, with its output in the file `log` there."""
        with (self.folder / log).open("a") as file:
            process = subprocess.Popen(
                self._inside(command),
                cwd=self.folder,
                env={**os.environ, **self.environment, **(environment or {})},
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(self, command: Sequence[str], timeout: float = 120.0) -> str:
        """Run a command to its end and return its output. Raises CalledProcessError where it fails."""
        done = subprocess.run(
            self._inside(command),
            cwd=self.folder,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
        )
        return done.stdout

    def _inside(self, command: Sequence[str]) -> list[str]:
        shell = f"hostname {self.name} && exec {shlex.join(command)}"
        return ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", shell]

    def pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def find(self, word: str) -> list[int]:
        """Return the processes whose command line holds `word`."""
        found = []
        for pid in self.pids():
            with suppress(OSError):
                if word in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(
                    errors="replace"
                ):
                    found.append(pid)
        return found

    def kill(self, number: int = signal.SIGKILL, word: str = "") -> None:
        """Send a signal to all its processes whose command line holds `word`."""
        for pid in self.find(word):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def set_link(self, *, up: bool) -> None:
        _ip("link", "set", self.link, "up" if up else "down")

    def output(self, log: str = "log") -> str:
        path = self.folder / log
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, text: str, seconds: float, log: str = "log") -> str:
        """Return the output once it holds `text`. Raises AssertionError with its end after `seconds`."""
        wait_until(
            lambda: text in self.output(log), seconds, lambda: f"no {text!r}:\n{self.output(log)[-3000:]}"
        )
        return self.output(log)

    def wait_until_steps_follow(self, text: str, seconds: float, log: str = "log") -> None:
        """Wait until a step was logged after the last line that holds `text`."""

        def follows() -> bool:
            output = self.output(log)
            return text in output and "\nstep " in output.rpartition(text)[2]

        wait_until(follows, seconds, lambda: f"no step after {text!r}:\n{self.output(log)[-3000:]}")

    def end(self) -> None:
        """End all its processes: they share its network with nobody."""
        self.set_link(up=True)
        self.kill(signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while self.pids() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.kill()
        for process in self.processes:
            process.wait()


@contextmanager
def hosts(*names: str, environment: Mapping[str, str] | None = None) -> Iterator[list[Host]]:
    """Yield hosts that are connected to one another, and to nothing else."""
    tag = f"rd{os.getpid() % 100_000}"
    subnet = f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
    with ExitStack() as stack:
        # Ray puts sockets into these folders, and the path of a socket must be short.
        base = Path(tempfile.mkdtemp(prefix="rd"))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        _ip("link", "add", tag, "type", "bridge")
        stack.callback(_ip, "link", "del", tag)
        _ip("link", "set", tag, "up")
        addresses = {name: f"{subnet}.{number}" for number, name in enumerate(names, start=1)}
        table = "127.0.0.1 localhost\n" + "".join(
            f"{address} {name}\n" for name, address in addresses.items()
        )
        made = [
            _make(stack, tag, number, name, addresses[name], table, base)
            for number, name in enumerate(names, start=1)
        ]
        for host in made:
            host.environment.update(environment or {})
        yield made


def _make(stack: ExitStack, tag: str, number: int, name: str, address: str, table: str, base: Path) -> Host:
    namespace, link = f"{tag}-{name}", f"{tag}v{number}"
    _ip("netns", "add", namespace)
    stack.callback(_ip, "netns", "del", namespace)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    _ip("link", "set", link, "master", tag, "up")
    for words in (
        ("link", "set", "lo", "up"),
        ("addr", "add", f"{address}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
    ):
        _ip("-n", namespace, *words)
    # `ip netns exec` puts the files of this folder over those of /etc.
    etc = Path("/etc/netns") / namespace
    etc.mkdir(parents=True)
    stack.callback(shutil.rmtree, etc)
    (etc / "hosts").write_text(table)
    folder = base / name
    folder.mkdir()
    host = Host(name, address, namespace, link, folder)
    stack.callback(host.end)
    return host


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout


def wait_until(check: Callable[[], bool], seconds: float, describe: Callable[[], str]) -> None:
    """Wait until `check()` is true. Raises AssertionError with `describe()` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.1)
