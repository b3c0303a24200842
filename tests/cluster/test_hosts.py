"""Hosts share nothing, a crash ends all that runs on one, and nothing is left of them, also where a test fails."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, hosts, needs_hosts, wait_until

pytestmark = needs_hosts
SECONDS = 60.0
CONNECT = "import socket; socket.create_connection(({!r}, 7000), timeout=0.5).close()"
LISTEN = (
    "import socket; server = socket.create_server(('', 7000)); print('ready', flush=True)\n"
    "while True: server.accept()[0].close()"
)


def reaches(host: Host, other: Host) -> bool:
    try:
        host.run(["python3", "-c", CONNECT.format(other.name)])
    except AssertionError:
        return False
    return True


def left_over(made: list[Host]) -> list[str]:
    """Return what there is of hosts: namespaces, links, files, processes."""
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    found = [host.namespace for host in made if f"{host.namespace} " in f"{names} "]
    found += [host.link for host in made if f" {host.link}@" in links]
    found += [str(host.folder) for host in made if host.folder.exists()]
    found += [str(host.init) for host in made if Path(f"/proc/{host.init}").exists()]
    return found + [host.namespace for host in made if (Path("/etc/netns") / host.namespace).exists()]


def test_hosts_share_nothing_but_the_network() -> None:
    with hosts("a", "b") as (a, b):
        a.run(["touch", "/tmp/mine", "/dev/shm/mine"])
        assert "mine" not in b.run(["ls", "/tmp", "/dev/shm"])
        assert a.run(["hostname"]) == "a\n"
        a.start(["python3", "-c", LISTEN])
        a.wait_for("ready", SECONDS)
        assert not b.find("create_server")
        assert reaches(b, a)
        a.set_link(up=False)
        assert not reaches(b, a)
        a.set_link(up=True)
        wait_until(lambda: reaches(b, a), SECONDS, lambda: "the link is not back")
        assert a.find("create_server")
        a.crash()
        assert not a.find("create_server")
        assert not reaches(b, a)
        assert "mine" in a.run(["ls", "/tmp"])  # A disk outlives a power cut; memory does not.
        assert "mine" not in a.run(["ls", "/dev/shm"])


def test_hosts_made_side_by_side_have_networks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that were started one after the other must not meet where one of them has made hosts before."""
    with hosts("a") as (one,), hosts("a") as (two,):
        assert one.address != two.address
        assert one.namespace != two.namespace
        next_process = os.getpid() + 1
        monkeypatch.setattr("os.getpid", lambda: next_process)
        with hosts("a") as (three,):
            assert three.address not in (one.address, two.address)
            assert three.run(["hostname"]) == "a\n"


def test_nothing_is_left_of_hosts_of_a_test_that_fails() -> None:
    made: list[Host] = []

    def fail() -> None:
        with hosts("a", "b") as found:
            made.extend(found)
            made[0].start(["sleep", "1000"])
            assert len(left_over(made)) == 10
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert left_over(made) == []
