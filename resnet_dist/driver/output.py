"""Check the output folder before anything is prepared or started: a run must be able to write all of its files."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RUNS_FOLDER
from resnet_dist.system.command import quoted
from resnet_dist.tracking.store import STORE_FILE, tracking_uri

# The store of MLflow, a checkpoint of a small network and the metrics take about this much.
MIN_FREE_BYTES = 8 * 2**20
# The longest path of a file of a run, below the output folder.
LONGEST_PATH_BYTES = 600
# SQLAlchemy reads these in the address of a SQLite file as the start of options, or as another character.
_NOT_IN_SQLITE = re.compile(r"\?|%[0-9A-Fa-f]{2}")


def check_output(output: Path) -> None:
    """Raise UserError, and leave nothing behind, where the files of a run cannot be written below `output`."""
    problem = _problem_of_name(output.absolute())
    try:
        problem = problem or _problem_of_place(output.absolute())
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    if problem is not None:
        raise UserError(f"--output {quoted(str(output))}: {problem}")


def _problem_of_name(output: Path) -> str | None:
    text = str(output)
    if any(sign < " " or sign == "\x7f" for sign in text):
        return "has a line break or another control character in its name; give another folder"
    if any("\ud800" <= sign <= "\udfff" for sign in text):
        return "has a name that is not UTF-8, which MLflow cannot store; give another folder"
    if tracking_uri(output).startswith("sqlite:") and (match := _NOT_IN_SQLITE.search(text)):
        return (
            f"MLflow's store cannot lie there, because its path contains {match[0]!r}; give another folder, or name a "
            "server in MLFLOW_TRACKING_URI"
        )
    return None


def _problem_of_place(output: Path) -> str | None:
    existing = _nearest_existing(output)
    if existing.is_symlink() and not existing.exists():
        return f"{quoted(str(existing))} is a broken link; give another folder"
    if not existing.is_dir():
        return f"{quoted(str(existing))} is a file; give another folder"
    if problem := _problem_of_length(output, existing):
        return problem
    # All of these may have been made by somebody else, such as root in a container.
    for folder in (existing, output / RUNS_FOLDER, output / "artifacts"):
        if folder.is_dir():
            _try_to_write(folder)
    store = output / STORE_FILE
    if store.exists() and not os.access(store, os.W_OK):
        return f"{quoted(str(store))} cannot be written (no permission); give another folder"
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


def _problem_of_length(output: Path, existing: Path) -> str | None:
    longest_name, longest_path = os.pathconf(existing, "PC_NAME_MAX"), os.pathconf(existing, "PC_PATH_MAX")
    for part in output.relative_to(existing).parts:
        if len(os.fsencode(part)) > longest_name:
            return f"a name in it has {len(os.fsencode(part))} bytes, at most {longest_name} are possible"
    if len(os.fsencode(output)) + LONGEST_PATH_BYTES > longest_path:
        return f"its path is too long: the paths of a run's files have at most {longest_path} bytes"
    return None


def _try_to_write(folder: Path) -> None:
    """Raise OSError where a file cannot be written: rights alone show no quota, and no read-only file system."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())
