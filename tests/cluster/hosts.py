"""Hosts on one machine that share nothing: each with an address, a name, processes and temporary files of its own.

A host is a network namespace, and namespaces of processes, mounts, names and shared memory that end with one process: a
host cannot outlive its test, whatever ends that. Needs root, iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.paths import ROOT

ISOLATION = ["--uts", "--ipc", "--mount", "--pid"]
TEMPORARY = Path("/tmp")  # of each host its own; its working folder too
READY_FILE, BOOT_LOG = ".ready", "boot.log"
# The first process of a host: it hides the temporary files of this machine, and reaps what its parents have left.
BOOT = f"""
set -e
hostname "$1"
folder=$2
shift 2
for path in "$@"; do
    mkdir -p "$folder/${{path#{TEMPORARY}/}}"
    mount --bind "$path" "$folder/${{path#{TEMPORARY}/}}"
done
mount -t tmpfs tmpfs /dev/shm
mount --rbind "$folder" {TEMPORARY}
cd {TEMPORARY}
touch {READY_FILE}
while :; do sleep 3600 & wait $!; done
"""
# Of the shell that runs the tests; a host has its own.
OWN_VARIABLES = ("AWS_", "RAY_", "MLFLOW_", "XDG_", "TMPDIR")
# 10.200.0.0/16 and those after it, cut into networks of a switch each, whose names hold their numbers.
FIRST_NETWORK, NUM_NETWORKS = 200, 50 * 250


def why_not() -> str | None:
    """Return why this machine cannot make hosts, or None."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    for program in ("ip", "unshare", "nsenter", "setpriv"):
        if shutil.which(program) is None:
            return f"needs {program} (iproute2, util-linux), to make network namespaces"
    tried = ["unshare", "--net", *ISOLATION, "--fork", "--mount-proc", "true"]
    done = subprocess.run(tried, capture_output=True, check=False)
    return None if done.returncode == 0 else "needs a kernel that allows network namespaces"


needs_hosts = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@dataclass
class Host:
    """One host: its processes see only its own network and temporary files, and other hosts by name and address."""

    name: str
    address: str
    namespace: str
    link: str  # the end of its cable that lies in the switch
    folder: Path  # its temporary files, which its own processes see as /tmp
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    init: int = 0  # its first process, with which all others end

    def boot(self) -> None:
        (self.folder / READY_FILE).unlink(missing_ok=True)
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "ip",
            "netns",
            "exec",
            self.namespace,
            "unshare",
            *ISOLATION,
        ]
        command += [
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-c",
            BOOT,
            "sh",
            self.name,
            str(self.folder),
        ]
        with (self.folder / BOOT_LOG).open("a") as file:
            keeper = subprocess.Popen(
                [*command, *map(str, _needed())],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.processes.append(keeper)
        wait_until(lambda: (self.folder / READY_FILE).exists(), 60, lambda: self.output(BOOT_LOG))
        self.init = int(Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text())

    def crash(self) -> None:
        """End all processes at once, as a power cut does, and boot; the files and the link stay."""
        self.end()
        self.boot()

    def end(self) -> None:
        """End all processes, and wait for that."""
        with suppress(ProcessLookupError):
            if self.init:
                os.kill(self.init, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.processes.clear()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, log: str = "log"
    ) -> subprocess.Popen[str]:
        """Start a command in the host's folder, with its output in the file `log` there."""
        with (self.folder / log).open("a") as file:
            process = subprocess.Popen(
                self._inside(command),
                env=self._variables(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(self, command: Sequence[str], timeout: float = 120.0) -> str:
        """Run a command to its end and return its output. Raises AssertionError with it where it fails."""
        done = subprocess.run(
            self._inside(command),
            env=self._variables({}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    def _variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(OWN_VARIABLES)}
        return {**ours, "HOME": str(TEMPORARY), **self.environment, **environment}

    def _inside(self, command: Sequence[str]) -> list[str]:
        shell = f"cd {TEMPORARY} && exec {shlex.join(command)}"
        return ["nsenter", f"--target={self.init}", "--net", *ISOLATION, "sh", "-c", shell]

    def find(self, words: str) -> list[int]:
        """Return the processes whose command line, or title, holds `words`."""
        found = []
        for pid in _ip("netns", "pids", self.namespace).split():
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words in line and not line.startswith("nsenter"):
                    found.append(int(pid))
        return found

    def kill(self, words: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to all its processes whose command line holds `words`; there must be one."""
        pids = self.find(words)
        assert pids, f"{self.name} has no process {words!r}"
        for pid in pids:
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


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Yield hosts that reach one another and this machine, which reaches them; nothing else."""
    with ExitStack() as stack:
        # Ray puts sockets into these folders, and the path of a socket must be short.
        base = Path(tempfile.mkdtemp(prefix="rd"))
        stack.callback(shutil.rmtree, base, ignore_errors=True)
        tag, subnet = _make_switch()
        stack.callback(_ip, "link", "del", tag)
        _ip("addr", "add", f"{subnet}.254/24", "dev", tag)
        _ip("link", "set", tag, "up")
        addresses = {name: f"{subnet}.{number}" for number, name in enumerate(names, start=1)}
        table = "127.0.0.1 localhost\n" + "".join(
            f"{address} {name}\n" for name, address in addresses.items()
        )
        yield [
            _make(stack, tag, number, name, addresses[name], table, base)
            for number, name in enumerate(names, start=1)
        ]


def _make_switch() -> tuple[str, str]:
    """Make a switch; return its name, and the first three numbers of a network that nobody has.

    Tests run side by side: the kernel takes a name once, and with the name its network.
    """
    for offset in range(NUM_NETWORKS):
        number = (os.getpid() + offset) % NUM_NETWORKS
        tag = f"rd{number}"
        done = subprocess.run(
            ["ip", "link", "add", tag, "type", "bridge"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return tag, f"10.{FIRST_NETWORK + number // 250}.{number % 250}"
        assert "File exists" in done.stderr, done.stderr
    raise AssertionError(f"all {NUM_NETWORKS} networks are taken")


def _make(stack: ExitStack, tag: str, number: int, name: str, address: str, table: str, base: Path) -> Host:
    namespace, link = f"{tag}-{name}", f"{tag}v{number}"
    _ip("netns", "add", namespace)
    stack.callback(_ip, "netns", "del", namespace)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
    # The kernel would remove it some time after the last connection of the host has timed out.
    stack.callback(_ip, "link", "del", link)
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
    folder.chmod(0o1777)
    host = Host(name, address, namespace, link, folder)
    stack.callback(host.end)
    host.boot()
    return host


def _needed() -> list[Path]:
    """Return the folders below /tmp that Python needs on every host."""
    paths = {Path(path).resolve() for path in (str(ROOT), sys.prefix, sys.base_prefix, *sys.path) if path}
    return sorted(path for path in paths if path.is_dir() and TEMPORARY in path.parents)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {shlex.join(words)}: {done.stderr}"
    return done.stdout


def wait_until(check: Callable[[], bool], seconds: float, describe: Callable[[], str]) -> None:
    """Wait until `check()` is true. Raises AssertionError with `describe()` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.1)
