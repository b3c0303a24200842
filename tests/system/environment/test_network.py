"""The loopback interface, and variables that name an interface which this machine lacks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist.errors import UserError
from resnet_dist.system.environment import network
from tests.paths import ROOT


def test_the_loopback_of_this_machine_works() -> None:
    assert network.check_loopback() == []
    assert "lo" in network.interfaces() or not Path("/sys/class/net/lo").exists()


def test_a_loopback_that_is_down_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(
        UserError, match=r"127\.0\.0\.1 fails here \(Network is unreachable\): type `ip link set lo up`"
    ):
        network.check_loopback()


def can_unshare() -> bool:
    """Report whether this user may make a network of its own, whose loopback interface is down."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="needs `unshare -n`, which root alone may use")
def test_ray_is_refused_at_once_where_loopback_is_down(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "resnet_dist", "train", str(ROOT / "jobs/digits.py")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        ["unshare", "-n", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: Ray needs the loopback interface")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["", "eth0", "eth0,lo"])
def test_interfaces_that_exist(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: ["lo", "eth0"])
    os.environ["GLOO_SOCKET_IFNAME"] = value
    assert network.check_interface_of_gloo() == []


def test_an_interface_that_is_missing_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: ["lo", "eth0"])
    os.environ["GLOO_SOCKET_IFNAME"] = "lo,ib0"
    with pytest.raises(
        UserError, match=r"^GLOO_SOCKET_IFNAME=lo,ib0: .* no interface ib0 .* it has lo, eth0: name one"
    ):
        network.check_interface_of_gloo()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("eth", True),
        ("ib,eth", True),
        ("=eth0", True),
        ("=eth", False),
        ("ib", False),
        ("^docker", True),
        ("", True),
    ],
)
def test_interfaces_of_nccl(value: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: ["lo", "eth0"])
    os.environ["NCCL_SOCKET_IFNAME"] = value
    monkeypatch.setattr(network, "num_gpus", lambda: 0)
    assert network.check_interface_of_nccl() == []  # NCCL is not used.
    monkeypatch.setattr(network, "num_gpus", lambda: 1)
    if found:
        assert network.check_interface_of_nccl() == []
    else:
        with pytest.raises(UserError, match=f"^NCCL_SOCKET_IFNAME={value}: .*it has lo, eth0"):
            network.check_interface_of_nccl()


@pytest.mark.parametrize(
    ("nccl", "gloo", "used"),
    [
        ("", None, None),
        ("eth", None, "eth0"),
        ("ib,eth", None, "ib0"),
        ("=eth1", None, "eth1"),
        ("=eth", None, None),
        ("^eth", None, "ib0"),
        ("^=eth0,ib0", None, "eth1"),
        ("^ib,eth", None, None),
        ("lo", None, "lo"),
        ("eth", "ib0", "ib0"),
    ],
)
def test_gloo_follows_nccl_where_only_nccl_is_named(
    nccl: str, gloo: str | None, used: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "interfaces", lambda: ["lo", "ib0", "eth0", "eth1"])
    for variable, value in (("NCCL_SOCKET_IFNAME", nccl), ("GLOO_SOCKET_IFNAME", gloo)):
        if value is not None:
            os.environ[variable] = value
    network.follow_nccl()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == used


def test_the_node_whose_interface_is_missing_is_named() -> None:
    error = (
        "ray::RayTrainWorker.execute() (pid=7, ip=10.0.0.3, actor_id=1)\nRuntimeError: [enforce fail at device.cc:84] "
        "ifa != nullptr. Unable to find address for: eth77"
    )
    sentence = network.interface_problem(error)
    assert sentence is not None
    assert sentence.startswith(
        "GLOO_SOCKET_IFNAME=eth77 of the node 10.0.0.3 names no interface with an address there"
    )
    assert (
        network.interface_problem("ray::RayTrainWorker (ip=10.0.0.3) RuntimeError: Connection refused")
        is None
    )
