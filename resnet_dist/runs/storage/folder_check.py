"""Check a folder before anything is prepared or started: a run must be able to write all of its files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.system.command import quoted

# The store of MLflow, a checkpoint of a small network and the metrics take about this much.
MIN_FREE_BYTES = 8 * 2**20
# The longest path of a file of a run, below the output folder.
LONGEST_PATH_BYTES = 600


def check_folder(folder: Path, inner: Iterable[str] = ()) -> None:
    """Raise UserError, and leave nothing behind, where the files of a run cannot be written below `folder`.

    inner: the folders in it, where they exist, that are written to as well.
    """
    problem = _problem_of_name(str(folder))
    try:
        problem = problem or _problem_of_place(folder, inner)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    if problem is not None:
        raise UserError(f"--output {quoted(str(folder))}: {problem}")


def _problem_of_name(text: str) -> str | None:
    if any(sign < " " or sign == "\x7f" for sign in text):
        return "has a line break or another control character in its name; give another folder"
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return "has a name that is not UTF-8, which MLflow cannot store; give another folder"
    return None


def _problem_of_place(folder: Path, inner: Iterable[str]) -> str | None:
    existing = _nearest_existing(folder)
    if existing.is_symlink() and not existing.exists():
        return f"{quoted(str(existing))} is a broken link; give another folder"
    if not existing.is_dir():
        return f"{quoted(str(existing))} is a file; give another folder"
    if problem := _problem_of_length(folder, existing):
        return problem
    # All of these may have been made by somebody else, such as root in a container.
    for place in (existing, *(folder / name for name in inner)):
        if place.is_dir():
            try_to_write(place)
    space = os.statvfs(existing)
    free = space.f_bavail * space.f_frsize
    if free < MIN_FREE_BYTES:
        return f"has {free / 2**20:.1f} MiB free, a run needs at least {MIN_FREE_BYTES / 2**20:.0f}; free some, or give another folder"
    return None


def _nearest_existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists; a broken link counts as existing."""
    while not os.path.lexists(path):
        path = path.parent
    return path


def _problem_of_length(folder: Path, existing: Path) -> str | None:
    longest_name, longest_path = os.pathconf(existing, "PC_NAME_MAX"), os.pathconf(existing, "PC_PATH_MAX")
    for part in folder.relative_to(existing).parts:
        if len(os.fsencode(part)) > longest_name:
            return f"a name in it has {len(os.fsencode(part))} bytes, at most {longest_name} are possible"
    if len(os.fsencode(folder)) + LONGEST_PATH_BYTES > longest_path:
        return f"its path is too long: the paths of a run's files have at most {longest_path} bytes"
    return None


def try_to_write(folder: Path) -> None:
    """Raise OSError where a file cannot be written: rights alone show no quota, and no read-only file system."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())
