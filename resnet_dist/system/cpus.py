"""Count the CPUs that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from resnet_dist.system.environment.cgroups import ROOT, control_groups

NO_QUOTA = 2.0**31
# Turns of an OpenMP thread that waits for others before it sleeps. GCC's library waits for milliseconds, which a thread
# that has no CPU at that moment costs all others: see docs/performance.md.
SPIN_VARIABLE, SPIN_TURNS = "GOMP_SPINCOUNT", "1000"
WAIT_VARIABLE = "OMP_WAIT_POLICY"


def cpu_count(root: Path = ROOT) -> int:
    """Return the CPUs of this process's affinity mask, or fewer where a container or a batch job has a quota.

    A quota of 1.5 CPUs counts as 1: with two threads, each waits at every layer for the other, which the kernel holds
    back, and training takes many times as long.
    """
    return max(1, min(_cpus_of_mask(), *(int(quota) for quota in _quotas(root))))


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP threads sleep soon where they wait, unless the person has chosen. Call it before torch is imported."""
    if WAIT_VARIABLE not in environment:
        environment.setdefault(SPIN_VARIABLE, SPIN_TURNS)


def _cpus_of_mask() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs that each control group allows this process; skip groups without a quota."""
    yield NO_QUOTA
    for folder in control_groups("cpu", root):
        for read in (_quota_v1, _quota_v2):
            try:
                quota, period = read(folder)
            except (OSError, ValueError):  # no such file, or the quota is "max"
                continue
            if quota > 0 and period > 0:  # Version 1 writes -1 for none.
                yield quota / period


def _quota_v1(folder: Path) -> tuple[int, int]:
    return int((folder / "cpu.cfs_quota_us").read_text()), int((folder / "cpu.cfs_period_us").read_text())


def _quota_v2(folder: Path) -> tuple[int, int]:
    quota, period = (folder / "cpu.max").read_text().split()
    return int(quota), int(period)
