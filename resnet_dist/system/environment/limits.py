"""Limits that a shell, a container or a login node sets to processes: enough for a training, or a sentence."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.system.environment.cgroups import ROOT, control_groups
from resnet_dist.system.environment.folders import own_folder, problem_of

MIB = 2**20
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Limit:
    """A limit of the shell's `ulimit`, and the least that works here, measured on two CPUs."""

    number: int  # the number in Python's resource module
    option: str  # the option of ulimit
    unit: int  # the unit of ulimit's numbers, in bytes or pieces
    counted: str  # the thing that it limits
    advice: str  # a value for ulimit
    local: int
    ray: int
    ray_per_worker: int  # in addition, for each CPU or rank

    def needed(self, num_workers: int) -> int:
        """Return the least that a training needs. num_workers: of Ray on this machine; 0 without Ray."""
        return self.ray + self.ray_per_worker * num_workers if num_workers else self.local

    @property
    def now(self) -> int:
        return resource.getrlimit(self.number)[0]

    @property
    def described(self) -> str:
        """The limit as `ulimit` shows it."""
        return f"`ulimit {self.option}` is {self.now // self.unit} {self.counted}"


OPEN_FILES = Limit(resource.RLIMIT_NOFILE, "-n", 1, "open files", "4096", 48, 128, 8)
FILE_SIZE = Limit(resource.RLIMIT_FSIZE, "-f", 1024, "KiB for one file", "unlimited", 16 * MIB, 192 * MIB, 0)
MEMORY = Limit(
    resource.RLIMIT_AS, "-v", 1024, "KiB of addresses", "unlimited", 3500 * MIB, 5400 * MIB, 64 * MIB
)
PROCESSES = Limit(resource.RLIMIT_NPROC, "-u", 1, "processes and threads of this user", "4096", 24, 300, 60)
LIMITS = (OPEN_FILES, FILE_SIZE, MEMORY, PROCESSES)


def check_limits(num_workers: int) -> list[str]:
    """Raise soft limits that are too low for a training as far as the hard ones allow.

    num_workers: the CPUs or ranks of Ray on this machine; 0 without Ray. Raises UserError where a hard limit is too low.
    """
    for limit in LIMITS:
        if limit is not PROCESSES or os.geteuid() != 0:  # Root's processes are not limited.
            _check(limit, limit.needed(num_workers), num_workers)
    return []


def _check(limit: Limit, needed: int, num_workers: int, used: Callable[[], int] | None = None) -> None:
    soft, hard = resource.getrlimit(limit.number)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard == resource.RLIM_INFINITY or hard >= needed:
        resource.setrlimit(limit.number, (hard, hard))
        return
    who = "Ray" if num_workers else "training"
    local = limit.needed(0)
    alternative = "" if num_workers == 0 or hard < local else ", or train with --local"
    raise UserError(
        f"{limit.described}, and {who} needs {-(-needed // limit.unit)}: type `ulimit {limit.option} {limit.advice}`, "
        f"which the administrator or the container must allow{alternative}"
    )


def check_processes_of_group(num_workers: int, root: Path = ROOT) -> list[str]:
    """Raise UserError where a container or a batch job allows too few processes and threads."""
    needed = PROCESSES.needed(num_workers)
    for folder in control_groups("pids", root):
        try:
            allowed, used = int((folder / "pids.max").read_text()), int((folder / "pids.current").read_text())
        except (OSError, ValueError):  # no such file, or the limit is "max"
            continue
        if allowed - used < needed:
            who = "Ray" if num_workers else "training"
            alternative = ", or train with --local" if num_workers else ""
            raise UserError(
                f"this container or job may have {allowed} processes and threads, {used} of which are in use "
                f"({folder / 'pids.max'}), and {who} needs {needed} more: raise its limit, such as docker's "
                f"--pids-limit{alternative}"
            )
    return []


def shared_memory() -> tuple[Path | None, list[str]]:
    """Return a folder for Ray's object store, None for its default, and what a person should know about it."""
    problem = problem_of(SHARED_MEMORY, min_free_bytes=0)
    own = own_folder()
    if problem is None or own is None:
        return None, []
    return own, [f"{SHARED_MEMORY} {problem}: Ray's object store uses {own}"]
