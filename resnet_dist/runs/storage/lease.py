"""The right to write to a run: one holder at a time, which renews it while it lives.

A storage with locks of the kernel tells at once whether the holder lives. Without them, or from another host, a holder
counts as dead when its counter has not moved for EXPIRY_SECONDS on the clock of the one who waits: the clocks of two
machines are never compared.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from resnet_dist.errors import StorageError
from resnet_dist.runs.storage.protocol import Report, Storage
from resnet_dist.system.locks import LockHeld
from resnet_dist.system.provenance import user_name

log = logging.getLogger(__name__)

LEASE_FILE, LOCK_FILE = "lease.json", "lock"
BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
WATCH_SECONDS = 1.0  # between two looks at the lease of another


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease, as the lease records it."""

    id: str  # unique
    host: str
    user: str
    pid: int
    process: str  # identifies the process on its machine; empty: unknown
    since: str
    beat: int = 0  # grows while the holder lives

    @classmethod
    def this_process(cls) -> Holder:
        since = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        pid = os.getpid()
        return cls(uuid.uuid4().hex, platform.node(), user_name(), pid, _identity(pid) or "", since)

    @classmethod
    def parse(cls, content: bytes) -> Holder | None:
        """Return the holder that a lease names; None where it is free, or was written by another version."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return None

    def encode(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def is_dead(self) -> bool | None:
        """Report whether the holder's process has ended; None where this machine cannot know."""
        machine = self.process.rpartition(" ")[0].rpartition(" ")[0]
        if not machine or machine != _machine():
            return None
        return _identity(self.pid) != self.process

    def __str__(self) -> str:
        return f"{self.user} on {self.host}, process {self.pid}, since {self.since}"


class LeaseHeld(Exception):
    """A lease that a living process holds; None where it is not known which."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(str(holder))
        self.holder = holder


class Heartbeat:
    """The age of a lease's heartbeat, by the clock of this process alone. For drivers that wait, and for ranks."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.monotonic) -> None:
        self._storage, self._clock = storage, clock
        self._seen: bytes | None = None
        self._seen_at = clock()

    def look(self) -> Holder | None:
        """Read the lease; return its holder. Raises StorageError."""
        found = self._storage.read(LEASE_FILE)
        if found != self._seen:
            self._seen, self._seen_at = found, self._clock()
        return None if found is None else Holder.parse(found)

    def age_seconds(self) -> float:
        """Return the time since the lease was seen to change."""
        return self._clock() - self._seen_at


class Lease:
    """A lease that this process holds; a thread renews it."""

    def __init__(
        self, storage: Storage, holder: Holder, version: str, on_lost: Callable[[Holder | None], None]
    ) -> None:
        self._storage, self._holder, self._version, self._on_lost = storage, holder, version, on_lost
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def holder(self) -> Holder:
        return self._holder

    def release(self) -> None:
        """End the heartbeat and free the lease; a second call does nothing."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        try:
            self._storage.replace(LEASE_FILE, b"{}\n", self._version)
        except StorageError as error:
            log.warning("the lease of the run could not be released, and ends by itself: %s", error)

    def _renew(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            next_beat = replace(self._holder, beat=self._holder.beat + 1)
            try:
                version = self._storage.replace(LEASE_FILE, next_beat.encode(), self._version)
                if version is None:
                    found = self._storage.read(LEASE_FILE)
                    self._on_lost(None if found is None else Holder.parse(found))
                    return
            except StorageError:  # Try again at the next beat.
                continue
            self._holder, self._version = next_beat, version


def log_loss(holder: Holder | None) -> None:
    """Log that another process took the run over. holder: None where the lease was removed."""
    log.error("another process has taken this run over: %s", holder or "its lease was removed")


@contextmanager
def held_lease(
    storage: Storage, report: Report, on_lost: Callable[[Holder | None], None] = log_loss
) -> Iterator[Lease]:
    """Hold the lease of a run. Raises LeaseHeld where a living process holds it.

    Reports a wait for the lease of a process that may be dead. on_lost: called from a thread, with the new holder,
    where this process could not renew its lease in time and another one took it.
    """
    with ExitStack() as stack:
        try:
            is_locked = stack.enter_context(storage.lock(LOCK_FILE))
        except LockHeld:
            found = storage.read(LEASE_FILE)
            raise LeaseHeld(None if found is None else Holder.parse(found)) from None
        holder = Holder.this_process()
        version = _take(storage, holder, is_locked=is_locked, report=report)
        lease = Lease(storage, holder, version, on_lost)
        try:
            yield lease
        finally:
            lease.release()


def _take(storage: Storage, mine: Holder, *, is_locked: bool, report: Report) -> str:
    """Write this process into the lease and return the version. Raises LeaseHeld."""
    seen: Holder | None = None
    seen_at, pause = time.monotonic(), threading.Event()
    while True:
        found = storage.read_version(LEASE_FILE)
        if found is None:
            storage.create(LEASE_FILE, mine.encode())  # The next round shows whether it is ours.
            continue
        other = Holder.parse(found.content)
        if other == mine:
            return found.version
        if _is_free(other, is_locked) or (other == seen and time.monotonic() - seen_at >= EXPIRY_SECONDS):
            storage.replace(LEASE_FILE, mine.encode(), found.version)
            continue
        assert other is not None
        if other.is_dead() is False or (seen is not None and other != seen and other.id == seen.id):
            raise LeaseHeld(other)
        if seen is None or seen.id != other.id:
            seen, seen_at = other, time.monotonic()
            report(
                f"the run is held by {other}; waiting for up to {EXPIRY_SECONDS:.0f} s to see whether that process lives"
            )
        pause.wait(WATCH_SECONDS)


def _is_free(holder: Holder | None, is_locked: bool) -> bool:
    """Report whether a lease may be taken at once: it was released, or its holder is known to be dead.

    A lock of the kernel proves that only for processes of this host: some network file systems keep locks to one.
    """
    return holder is None or holder.is_dead() is True or (is_locked and holder.host == platform.node())


def _machine() -> str:
    """Return what identifies this machine since its start, and this container on it; empty where that is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _identity(pid: int) -> str | None:
    """Return what identifies a process of this machine; None where there is none, or where it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" or not _machine() else f"{_machine()} {pid} {fields[19]}"
