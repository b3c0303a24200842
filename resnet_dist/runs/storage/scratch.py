"""The scratch folder of a person on a machine: what is being uploaded, and what was fetched last of each run.

    SCRATCH/writing/ID/…           a bundle that a process writes and uploads; its lock shows that the process lives
    SCRATCH/fetched/RUN/NAME/…     a bundle that the processes of this machine share
    SCRATCH/logs/RUN/…             what libraries wrote here while the run was trained

It is bounded: a bundle goes when it is uploaded, and a fetched one when another is fetched ten minutes or more after
its last use. Logs go a month after their run was last begun here.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from resnet_dist.errors import StorageError
from resnet_dist.system.files import expanded, is_disk_full
from resnet_dist.system.locks import LOCK_SUFFIX, locked_folders, own_folder, remove_unlocked

SCRATCH_VARIABLE = "RESNET_DIST_SCRATCH"
DEFAULT_SCRATCH = "~/.cache/resnet-dist/scratch"  # beside the shard cache
RECENT_SECONDS = 600.0  # A fetched bundle is kept for this long after its last use.
RUN_NAME = re.compile("[0-9a-f]{16}")  # of a run's folder among the logs, and among what was fetched
LOG_SECONDS = 30 * 24 * 3600.0


def scratch_folder() -> Path:
    """Return the folder that RESNET_DIST_SCRATCH names, or one in the cache of the user's home folder.

    Without a home folder that can be written to, it lies among the temporary files.
    """
    chosen = os.environ.get(SCRATCH_VARIABLE)
    folder = expanded(chosen or DEFAULT_SCRATCH)
    try:
        if not chosen and not folder.is_absolute():
            raise FileNotFoundError("this user has no home folder, and a folder called ~ would be made here")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        if chosen:
            raise
        folder = Path(tempfile.gettempdir()) / f"resnet-dist-{os.getuid()}"
        folder.mkdir(exist_ok=True, mode=0o700)
    return folder


@contextmanager
def explained_room() -> Iterator[None]:
    """Raise StorageError, which names the scratch folder, where the block finds its disk full."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise StorageError(
            f"the scratch folder {scratch_folder()}: No space left on device; free some, or set {SCRATCH_VARIABLE} to a "
            "folder on a larger disk"
        ) from error


@contextmanager
def written_folder() -> Iterator[Path]:
    """Yield a new folder, which is removed at the end; remove what processes that died have left."""
    with explained_room(), own_folder(scratch_folder() / "writing" / uuid.uuid4().hex) as folder:
        folder.mkdir()
        yield folder


def fetched_folder(run: str, name: str) -> Path:
    """Return the folder, which need not exist, for a bundle of a run; remove others that were not used lately.

    run: 16 hexadecimal digits, as in `log_folder`.
    """
    fetched = scratch_folder() / "fetched"
    folder = fetched / run / name
    folder.parent.mkdir(parents=True, exist_ok=True)
    paths = [*fetched.glob("*/*")]
    # Go by the name of the run where there is no lock: without flock, a lock ends with its use. What has neither may be a
    # person's, as the folder above may be one of theirs.
    ours = {path for path in paths if RUN_NAME.fullmatch(path.parent.name) and path.suffix != LOCK_SUFFIX}
    for other in (locked_folders(paths) | ours) - {folder}:
        with suppress(FileNotFoundError):  # A lock alone goes at once, unless its user holds it.
            if time.time() - other.stat().st_mtime <= RECENT_SECONDS:
                continue
        remove_unlocked(other)
    return folder


def log_folder(run: str) -> Path:
    """Return the folder for the logs of a run, which is created; remove those of runs of long ago.

    run: 16 hexadecimal digits, by which these folders are known from others.
    """
    logs = scratch_folder() / "logs"
    folder = logs / run
    folder.mkdir(parents=True, exist_ok=True)
    os.utime(folder)
    for other in logs.iterdir():
        if not RUN_NAME.fullmatch(other.name):
            continue
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > LOG_SECONDS:
                shutil.rmtree(other)
    return folder
