"""Listening sockets of a run on this machine: on loopback alone; and its token, which its owner alone reads."""

from __future__ import annotations

import ipaddress
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.jobs.real_head import PLAIN, read_until
from tests.paths import ROOT

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def processes_with(variable: str) -> Iterator[psutil.Process]:
    """Yield the processes in whose environment this is, as NAME=VALUE; those of Ray overwrite theirs with their titles."""
    name, _, value = variable.partition("=")
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                yield process
        except psutil.Error:
            continue


def listening(process: psutil.Process) -> list[str]:
    try:
        found = process.net_connections(kind="inet")
        title = process.name()
    except psutil.Error:
        return []
    return [f"{title} {each.laddr.ip}" for each in found if each.status == psutil.CONN_LISTEN]


def is_loopback(place: str) -> bool:
    address = ipaddress.ip_address(place.rpartition(" ")[2])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def test_a_run_on_this_machine_is_reached_from_nowhere_else(tmp_path: Path, digits_data: Path) -> None:
    fields = [f"data.{part}={digits_data}/{part}" for part in ("train", "eval")]
    command = [sys.executable, "-m", "resnet_dist", "train", str(ROOT / "jobs/digits.py"), "--workers", "2"]
    command += ["--cpu", "--set=model.name=resnet8", *(f"--set={field}" for field in fields)]
    process = subprocess.Popen(
        [*command, "--set=train.length=20000 steps"],
        cwd=tmp_path,
        env={**PLAIN, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        read_until(process, "step 20/")
        family = {process.pid: psutil.Process(process.pid)}
        family |= {each.pid: each for each in family[process.pid].children(recursive=True)}
        family |= {each.pid: each for each in processes_with(f"HOME={tmp_path}")}
        places = {place for each in family.values() for place in listening(each)}
        assert len(places) > 3  # Ray and the ranks are among them.
        assert {place for place in places if not is_loopback(place)} == set()
        token = tmp_path / ".ray/auth_token"
        assert token.exists()
        assert stat.S_IMODE(token.stat().st_mode) & 0o077 == 0
    finally:
        process.terminate()
        process.communicate(timeout=100)
    assert process.returncode == 130
