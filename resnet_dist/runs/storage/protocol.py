"""The interface of a storage. Names are relative, with `/` between their parts: `checkpoints/step-00000120/model`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from resnet_dist.errors import StorageError

Report = Callable[[str], None]  # shows one line to a person


class Unreachable(StorageError):
    """A storage that does not answer, or answers with errors of its own: another try may succeed."""


class Permit(Protocol):
    """The right to write to a run."""

    # Whether `check` decides between two writers; otherwise the one that finds traces of another gives up.
    decides: bool

    def check(self, recent_seconds: float = 0.0) -> None:
        """Return where this process may write. recent_seconds: the age of an earlier answer that is new enough.

        Raises Superseded where another one may, and Unreachable where it is not known at present.
        """


class Always:
    """The Permit of a process that nobody competes with."""

    decides = False

    def check(self, recent_seconds: float = 0.0) -> None:
        pass


ALWAYS: Permit = Always()
# Limit for a wait for a permit at a start, where nothing can be done without it.
PERMIT_WAIT_SECONDS, PERMIT_POLL_SECONDS = 300.0, 1.0


def wait_for_permit(permit: Permit) -> None:
    """Return where this process may write; wait while that is not known. Raises as `Permit.check` does."""
    deadline, pause = time.monotonic() + PERMIT_WAIT_SECONDS, threading.Event()
    while True:
        try:
            permit.check()
            return
        except Unreachable:
            if time.monotonic() >= deadline:
                raise
        pause.wait(PERMIT_POLL_SECONDS)


@dataclass(frozen=True)
class StoredObject:
    """One object of a storage."""

    name: str
    num_bytes: int
    modified: float  # seconds since 1970, by the clock of the storage


@dataclass(frozen=True)
class Versioned:
    """The content of an object, and a version that changes with it."""

    content: bytes
    version: str


class Storage(Protocol):
    """A folder or a bucket. Every call may raise StorageError; Unreachable where another try may succeed."""

    @property
    def location(self) -> str:
        """The absolute path or the URL: for messages, and for `open_storage` on other machines."""

    @property
    def poll_seconds(self) -> float:
        """The interval at which a loop may look for changes."""

    def check(self, *folders: str) -> None:
        """Raise UserError, in one sentence, where runs cannot be kept here; leave nothing behind.

        folders: those in it that are written to, which may exist with other rights.
        """

    def is_gone(self) -> bool:
        """Report whether a place that was written to has been removed or renamed; a bucket has no places to remove."""

    def local_folder(self) -> Path:
        """Return a folder on this machine for files that no other one reads, such as logs of libraries."""

    def at(self, name: str) -> Storage:
        """Return the storage of everything below `name`."""

    def read(self, name: str) -> bytes | None:
        """Return the content of an object; None where there is none."""

    def read_version(self, name: str) -> Versioned | None:
        """Return content and version of an object; None where there is none."""

    def write(self, name: str, content: bytes) -> None:
        """Create or replace an object: readers see all of the old content or all of the new one."""

    def create(self, name: str, content: bytes) -> bool:
        """Create an object and return True; return False where it exists with other content.

        Of several callers with different contents, one gets True.
        """

    def replace(self, name: str, content: bytes, version: str) -> str | None:
        """Replace an object that has `version`; return its new version, or None where it has another one."""

    def modified(self, name: str) -> float | None:
        """Return the time of an object's last change, by the clock of the storage; None where there is none."""

    def objects(self, prefix: str = "") -> list[StoredObject]:
        """Return all objects below `prefix`, in the order of their names."""

    def folders(self) -> list[str]:
        """Return the names of the folders directly below this place, in order."""

    def delete(self, *names: str) -> None:
        """Remove objects, in this order; missing ones are no error."""

    def delete_all(self) -> None:
        """Remove everything here, and the folders above that are empty then."""

    def lock(self, name: str) -> AbstractContextManager[bool]:
        """Hold a lock that the death of this process releases. Raises locks.LockHeld where another process holds it.

        Yields False, and locks nothing, where this storage has no such locks.
        """

    def log(self, name: str) -> Log:
        """Return the log of that name, which need not exist."""

    def bundles(self, commit: str) -> Bundles:
        """Return the bundles directly below this place; `commit` is the file that each of them has."""


class LogWriter(Protocol):
    """The end of a log to which one process appends."""

    def write(self, line: bytes) -> None:
        """Append a line, which ends with a newline. Never waits for a server."""

    def flush(self) -> None:
        """Wait until all lines are in the storage. Raises StorageError where that fails."""

    def close(self) -> None:
        """Flush, and end."""


class Log(Protocol):
    """Lines that are appended and never changed. `str()` is its location."""

    @property
    def poll_seconds(self) -> float:
        """The shortest interval at which a reader may look for new lines; 0: as it likes."""

    def open(self, permit: Permit = ALWAYS) -> LogWriter:
        """Begin to append, after all lines that are there. `permit` is asked before each write."""

    def read(self, position: str = "") -> tuple[bytes, str]:
        """Return the lines after `position`, and the position after them. An empty position is the beginning."""

    def end(self) -> str:
        """Return the position after all lines that are there."""


class Bundles(Protocol):
    """Folders of files that appear and disappear at once, such as checkpoints and splits of shards.

    A bundle exists if and only if the file that commits it does.
    """

    def names(self) -> list[str]:
        """Return the names of all bundles, in order."""

    def location(self, name: str) -> str:
        """Return the path or URL of a bundle, for messages."""

    def write(self, name: str, permit: Permit = ALWAYS) -> AbstractContextManager[Path]:
        """Yield an empty folder on this machine, and publish what it holds at the end of the block.

        `permit` is asked before anything is published, and immediately before the commit. A bundle of that name is
        replaced. Nothing is published, and nothing left behind, where the block raises.
        Raises FileNotFoundError where the folder above this place has been removed: it is not made anew.
        """

    def fill(self) -> AbstractContextManager[Path]:
        """Yield a folder on this machine, of which each folder becomes a bundle, at the latest at the end of the block.

        What is written there may be seen at once, so the commits must come last.
        """

    def fetch(self, name: str, only: Collection[str] | None = None) -> Path:
        """Return a folder on this machine with the files of a bundle, or with `only` some of them and the commit.

        The processes of a node share the download. Do not change the files. Raises FileNotFoundError where there is
        no such bundle.
        """

    def forget(self, name: str) -> None:
        """Remove what `fetch` keeps on this machine of a bundle that turned out to be damaged."""

    def remove(self, name: str) -> None:
        """Remove a bundle, at once for its readers."""

    def clean_up(self) -> None:
        """Prepare to write: create the folder of this place, and remove what writers that died have left in it."""

    def remove_uncommitted(self) -> None:
        """Remove what belongs to no bundle, at once: no process may be writing here."""
