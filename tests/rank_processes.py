"""Find the processes of ranks under Ray: copies of a process of the same name, which only imports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from resnet_dist.launch.preload.client import SERVER

RAY_PROCESS = "RayTrainWorker"  # in the title of the process that Ray started for a rank


def copies(pids: Sequence[int]) -> list[int]:
    """Return those of the processes whose parent is among them."""
    return [pid for pid in pids if _parent(pid) in pids]


def ranks_with(variable: str) -> list[int]:
    """Return the ranks in whose environment this is, as NAME=VALUE."""
    return copies(list(_servers_with(variable)))


def _servers_with(variable: str) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            own = variable.encode() in (folder / "environ").read_bytes().split(b"\0")
            if own and SERVER.encode() in (folder / "cmdline").read_bytes():
                yield int(folder.name)


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0
