"""The memory of this process: what it can still get from its machine and container, and when garbage is collected."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

from resnet_dist.system.environment.cgroups import ROOT, control_groups

# For each version of cgroups: the files of limit and usage, and the reclaimable fields of memory.stat.
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
V2 = "memory.max", "memory.current", ("inactive_file", "active_file")

# The modules of torch and MLflow are a million objects that are never garbage. While they are imported, full collections
# take a sixth of the time; one that falls into training holds all ranks up.
DEFAULT_COLLECTIONS = gc.get_threshold()
# New containers before a collection, and collections before one of the next generation.
FEW_COLLECTIONS = (50_000, 20, 100)


def available_memory(root: Path = ROOT) -> int:
    """Return the bytes that a process can get, including what the kernel would reclaim from its file cache.

    This is the minimum over the machine and every control group of this process (a container's or a batch
    job's): the kernel kills a process that exceeds the limit of its group, however much memory the machine
    has.
    """
    return min(_available_on_machine(root), *_available_in_control_groups(root))


def ranks_of_this_node() -> int:
    """Return the ranks of this run on this node: LOCAL_WORLD_SIZE, which torchrun and Ray Train set, or 1."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _available_on_machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _available_in_control_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that each control group of this process leaves it; skip groups without a limit."""
    yield 2**63  # the value of a process without any limit
    for folder in control_groups("memory", root):
        for limit_name, usage_name, reclaimable in (V1, V2):
            try:
                limit = int((folder / limit_name).read_text())
                usage = int((folder / usage_name).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such file, or the limit is "max"
                continue
            yield max(0, limit - usage + sum(int(stat.get(name, 0)) for name in reclaimable))


def collect_rarely() -> None:
    """Collect garbage rarely from now on: this process begins to import."""
    gc.set_threshold(*FEW_COLLECTIONS)


def collect_normally() -> None:
    """Return to Python's own pace after `collect_rarely`, and leave all that exists now out of every collection."""
    if gc.get_threshold() == FEW_COLLECTIONS:
        gc.freeze()
        gc.set_threshold(*DEFAULT_COLLECTIONS)
