"""The right to write to a run: one holder at a time, which renews it while it lives.

A storage with locks of the kernel tells at once whether the holder lives. Without them, or from another host, a holder
counts as dead when its counter has not moved for EXPIRY_SECONDS on the clock of the one who waits: the clocks of two
machines are never compared.

What is written must have arrived before another process may take the lease. So a holder, and whoever writes for it, asks
whether the lease was renewed in the last FRESH_SECONDS, and leaves the rest of EXPIRY_SECONDS to the request.
"""

from __future__ import annotations

import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from resnet_dist.errors import StorageError, Superseded
from resnet_dist.runs.storage.holder import Holder
from resnet_dist.runs.storage.protocol import Report, Storage
from resnet_dist.system.locks import LockHeld

log = logging.getLogger(__name__)

LEASE_FILE, LOCK_FILE = "lease.json", "lock"
BEAT_SECONDS = 5.0
EXPIRY_SECONDS = 60.0
FRESH_SECONDS = 30.0
WATCH_SECONDS = 1.0  # between two looks at the lease of another


class LeaseHeld(Exception):
    """A lease that a living process holds; None where it is not known which."""

    def __init__(self, holder: Holder | None) -> None:
        super().__init__(str(holder))
        self.holder = holder


def real_seconds() -> float:
    """Return the time of a clock that runs on while the machine sleeps, from an unknown beginning."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Heartbeat:
    """The age of a lease's heartbeat, by the clock of this process alone."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = real_seconds) -> None:
        self._storage, self._clock = storage, clock
        self._seen: bytes | None = None
        self._looked_at = self._beat_after = clock()

    def look(self) -> tuple[bool, bytes | None]:
        """Read the lease; return whether it has changed since the last look, and its content. Raises StorageError."""
        begin = self._clock()
        found = self._storage.read(LEASE_FILE)
        changed = found != self._seen
        if changed:
            # The beat came after the look before this one: nothing more is known of its time.
            self._seen, self._beat_after = found, self._looked_at
        self._looked_at = begin
        return changed, found

    def age_seconds(self) -> float:
        """Return the longest time that may have passed since the newest beat that was seen."""
        return self._clock() - self._beat_after


class Lease:
    """A lease that this process holds; a thread renews it. It is the Permit of its holder, too."""

    decides = True

    def __init__(
        self, storage: Storage, holder: Holder, version: str, on_lost: Callable[[Holder | None], None]
    ) -> None:
        self._storage, self._holder, self._version, self._on_lost = storage, holder, version, on_lost
        self._renewed_at = real_seconds()
        self._lost: Superseded | None = None
        self._closed, self._losing, self._beating = threading.Event(), threading.Lock(), threading.Lock()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def holder(self) -> Holder:
        return self._holder

    @property
    def is_lost(self) -> bool:
        """Report whether another process was seen to hold the lease."""
        return self._lost is not None

    def is_fresh(self) -> bool:
        """Report, without a request, whether nobody else can hold the lease now."""
        return not self.is_lost and real_seconds() - self._renewed_at < FRESH_SECONDS

    def check(self, recent_seconds: float = 0.0) -> None:
        """Return where this process holds the lease still. See protocol.Permit."""
        if not self.is_lost and not self.is_fresh():
            # This process was stopped, its machine has slept, or the storage is away: renew the lease before a write.
            self._beat()
        if self._lost is not None:
            raise self._lost

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
            try:
                if not self._beat():
                    return
            except OSError:  # Try again at the next beat.
                continue

    def _beat(self) -> bool:
        """Renew the lease; return False where another one has it. Raises OSError where that cannot be known."""
        with self._beating:
            next_beat, begin = replace(self._holder, beat=self._holder.beat + 1), real_seconds()
            version = self._storage.replace(LEASE_FILE, next_beat.encode(), self._version)
            if version is None:
                found = self._storage.read_version(LEASE_FILE)
                if not self._is_ours(None if found is None else found.content):
                    return False
                # The answer to an earlier beat was lost. Renew what it wrote.
                assert found is not None
                version = self._storage.replace(LEASE_FILE, next_beat.encode(), found.version)
                if version is None:
                    raise StorageError(f"{self._storage.location}/{LEASE_FILE}: changes while it is renewed")
            self._holder, self._version, self._renewed_at = next_beat, version, begin
            return True

    def _is_ours(self, found: bytes | None) -> bool:
        """Report who holds the lease by its content; without one, the run was removed, and is nobody's."""
        holder = None if found is None else Holder.parse(found)
        if holder is not None and holder.id == self._holder.id:
            return True
        with self._losing:
            if self._lost is not None:
                return False
            if found is not None:
                self._lost = Superseded(loss_of(holder))
        self._on_lost(holder)
        return False


def log_loss(holder: Holder | None) -> None:
    """Log that another process took the run over. holder: None where the lease was removed."""
    log.error(loss_of(holder))


def loss_of(holder: Holder | None) -> str:
    """Return the sentence about a lease that is lost. holder: the new one; None where there is none."""
    return (
        f"another process has taken this run over: {holder}"
        if holder
        else "the run's lease was released or removed"
    )


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


def is_abandoned(storage: Storage) -> bool | None:
    """Report whether the holder of a lease is dead or has released it; None where only a wait can show that.

    Neither waits nor takes the lease.
    """
    found = storage.read(LEASE_FILE)
    holder = None if found is None else Holder.parse(found)
    if holder is None or holder.is_dead() is not None:
        return _is_free(holder, is_locked=False)
    if holder.host != platform.node():
        return None
    # This machine has been started again, or the holder was in a container on it: the lock of the kernel shows it.
    try:
        with storage.lock(LOCK_FILE) as is_locked:
            return True if is_locked else None
    except LockHeld:
        return False


def quiet_seconds(storage: Storage) -> float:
    """Return the time since the last beat of a lease. It compares the clocks of two machines: good for messages alone."""
    modified = storage.modified(LEASE_FILE)
    return 0.0 if modified is None else max(0.0, time.time() - modified)


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
