"""The control groups of this process: a container's or a batch job's limits of CPUs and memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # parent of proc and sys


def control_groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """Yield the folders of this process's groups for `controller`, innermost first: the limit of every one applies.

    They are groups of version 1 and 2; a folder may be missing or unreadable.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Version 1 mounts controllers together or alone; version 2 names none here, and has its own folder beside it.
        roots = {mounts / controller, mounts / controllers} if controllers else {mounts, mounts / "unified"}
        # Inside a container this may be the host's name, missing here; the mount is the container's own group.
        names = [name for name in Path(group.lstrip("/")).parts if name != ".."]
        for mount in roots:
            yield from (mount.joinpath(*names[:count]) for count in range(len(names), -1, -1))
