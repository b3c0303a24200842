"""How much memory a rank may still take: of the machine, of its container, and beside the other ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # under which proc and sys lie

# Of each version of cgroups: limit, usage, and in memory.stat what the kernel gives up for the asking.
V1 = "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
V2 = "memory.max", "memory.current", ("inactive_file", "active_file")


def available_memory(root: Path = ROOT) -> int:
    """Bytes that a process can get, with what the kernel would take back from its file cache.

    The least of what the machine has and what each control group of this process, a container's or a batch
    job's, leaves: beyond its limit the kernel kills, however much the machine has.
    """
    return min(_of_machine(root), *_of_control_groups(root))


def ranks_of_this_node() -> int:
    """Of this run, as torchrun and Ray Train tell every rank in its environment; one where nobody does."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _of_machine(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_control_groups(root: Path) -> Iterator[int]:
    """What each control group that holds this process leaves to it; a group without a limit says nothing."""
    yield 2**63
    for folder in _control_groups(root):
        for limit_name, usage_name, reclaimable in (V1, V2):
            try:
                limit = int((folder / limit_name).read_text())
                usage = int((folder / usage_name).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # absent, or "max"
                continue
            yield max(0, limit - usage + sum(int(stat.get(name, 0)) for name in reclaimable))


def _control_groups(root: Path) -> Iterator[Path]:
    """Folders of the groups of this process, from its own up: a limit anywhere on the way binds it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        # Inside a container the name may be the host's, which is not there: its mount is the container's own group.
        names = Path(group.lstrip("/")).parts
        yield from (mount.joinpath(*names[:count]) for count in range(len(names), -1, -1))
