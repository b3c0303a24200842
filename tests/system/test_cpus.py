"""The number of threads follows a container's quota of CPUs, whatever its control groups look like."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resnet_dist.system.cpus import SPIN_TURNS, SPIN_VARIABLE, cpu_count, limit_spinning

V1 = {"cpu.cfs_quota_us": "{quota}", "cpu.cfs_period_us": "100000"}
V2 = {"cpu.max": "{quota} 100000"}
HYBRID = "12:cpu,cpuacct:/job\n1:name=systemd:/\n0::/\n"


def write(root: Path, group: str, files: dict[str, str], quota: str) -> None:
    folder = root / "sys/fs/cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text.format(quota=quota) + "\n")


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("quota", "count"),
    [
        ("max", 8),
        ("-1", 8),
        ("50000", 1),
        ("100000", 1),
        ("150000", 1),
        ("200000", 2),
        ("390000", 3),
        ("9900000", 8),
    ],
)
@pytest.mark.parametrize(
    ("lines", "group", "files"),
    [
        ("0::/\n", "", V2),
        ("0::/system.slice/docker-1.scope\n", "system.slice/docker-1.scope", V2),
        ("0::/user.slice/job/step\n", "user.slice/job", V2),
        ("0::/../host\n", "", V2),
        (HYBRID, "cpu/job", V1),
        (HYBRID, "cpu,cpuacct", V1),
        ("5:cpu:/docker/of-the-host\n", "cpu", V1),
        ("1:name=systemd:/\n0::/job\n", "unified/job", V2),
    ],
)
def test_the_quota_of_a_group_counts(
    lines: str, group: str, files: dict[str, str], quota: str, count: int, tmp_path: Path
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(lines)
    write(tmp_path, group, files, quota)
    assert cpu_count(tmp_path) == count


def test_the_smallest_quota_of_nested_groups_counts(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/container\n")
    write(tmp_path, "pod/container", V2, "600000")
    write(tmp_path, "pod", V2, "400000")
    write(tmp_path, "", V2, "max")
    assert cpu_count(tmp_path) == 4


def test_groups_that_cannot_be_read_set_no_quota(tmp_path: Path) -> None:
    assert cpu_count(tmp_path) == 8  # no proc
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n3:cpu:/\n")
    assert cpu_count(tmp_path) == 8  # no sys
    write(tmp_path, "", {"cpu.max": "broken"}, "")
    (tmp_path / "sys/fs/cgroup/cpu").mkdir()
    (tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").mkdir()
    assert cpu_count(tmp_path) == 8


@pytest.mark.parametrize(
    ("before", "turns"),
    [({}, SPIN_TURNS), ({SPIN_VARIABLE: "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_a_persons_way_of_waiting_is_kept(before: dict[str, str], turns: str | None) -> None:
    environment = dict(before)
    limit_spinning(environment)
    assert environment.get(SPIN_VARIABLE) == turns
