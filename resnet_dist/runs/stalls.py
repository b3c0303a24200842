"""Reports of ranks that stand still, or do not end: one object of the run for each, written by a rank, shown by the driver.

They go through the storage and not through the spool, which rank 0 writes: rank 0 may be the one that hangs.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.system.redact import redact

log = logging.getLogger(__name__)

STALLS_FOLDER = "stalls"  # in the run folder
POLL_SECONDS = 2.0  # of the driver, where the storage allows it
CLOSE_SECONDS = 2.0  # that the driver waits for the reports of its last seconds


def write_stall(storage: Storage, attempt: int, key: str, line: str, details: Sequence[str]) -> None:
    """Write a report, unless another rank has reported the same event. Raises StorageError."""
    name = f"{STALLS_FOLDER}/attempt-{attempt:04}-{key}.txt"
    if storage.read(name) is None:
        text = "\n".join([line, "", f"{datetime.now():%Y-%m-%d %H:%M:%S}", *details])
        storage.create(name, f"{redact(text)}\n".encode())


@contextmanager
def shown_stalls(storage: Storage, show: Callable[[str], None]) -> Iterator[None]:
    """Show the first line of each report that is written inside, with the name of the file that has its stacks."""
    stop, known = threading.Event(), set[str]()
    interval = max(POLL_SECONDS, storage.poll_seconds)

    def look() -> None:
        # Those of earlier attempts were shown then.
        while not _new_reports(storage, known, lambda text: None):
            if stop.wait(interval):
                return
        while not stop.wait(interval):
            _new_reports(storage, known, show)
        _new_reports(storage, known, show)

    # A daemon thread: a storage that does not answer must not keep the process alive.
    thread = threading.Thread(target=look, name="stalls", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(CLOSE_SECONDS)


def _new_reports(storage: Storage, known: set[str], show: Callable[[str], None]) -> bool:
    """Show the reports that are not known yet; return whether the storage answered."""
    try:
        for found in storage.objects(STALLS_FOLDER):
            if found.name not in known and (content := storage.read(found.name)):
                known.add(found.name)
                line, _, rest = content.decode().partition("\n")
                has_stacks = len(rest.splitlines()) > 2  # more than the time
                show(f"{line} ({storage.location}/{found.name})" if has_stacks else line)
    except Exception as error:  # The next look may succeed, and nothing may end the thread.
        log.debug("the reports of stalls cannot be read now: %s", error)
        return False
    return True
