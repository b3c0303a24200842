"""The fence of a rank: it writes only while its attempt is the run's newest and its driver lives; otherwise it ends.

    attempt in run.json is newer             another attempt has begun: the rank ends
    lease.json is free or another's          the driver has given the run up, or lost it: the rank ends
    lease.json has not moved for             FRESH_SECONDS: the rank writes nothing; END_SECONDS: it ends
    the storage does not answer              the rank trains on, and writes nothing before it has read both again
    … and nothing has moved for              CUT_OFF_SECONDS: the rank is cut off, and ends

Another driver takes a lease after EXPIRY_SECONDS, which are more than END_SECONDS. Each rank reads two small objects every
LOOK_SECONDS or so: 1,000 ranks make 200 requests a second, where S3 answers 5,500 for one prefix.
"""

from __future__ import annotations

import json
import random
import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from resnet_dist.errors import StorageError, Superseded
from resnet_dist.launch.attempt import Attempt
from resnet_dist.runs.folder import RUN_FILE, TOKENS_FOLDER
from resnet_dist.runs.storage.holder import Holder
from resnet_dist.runs.storage.lease import FRESH_SECONDS, Heartbeat, real_seconds
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.runs.storage.protocol import Storage, Unreachable
from resnet_dist.system.signals import limit_exit

LOOK_SECONDS = 10.0
JITTER = 0.2  # Part of LOOK_SECONDS by which looks vary: ranks that began together do not ask together.
END_SECONDS = 45.0
CUT_OFF_SECONDS = 300.0  # as long as a checkpoint is tried to be written
EXIT_SECONDS = 10.0  # for a rank that ends to report that; its process then exits
MAX_POLL_SECONDS = 1.0  # The time between two polls counts no longer: the machine has slept.
PROBE = b" " * 4096  # A file without content would fit on a full disk.


class Fence:
    """The Permit of a rank. It looks at the storage from a thread once it is started."""

    decides = True

    def __init__(
        self,
        storage: Storage,
        attempt: int,
        holder: str,
        *,
        clock: Callable[[], float] = real_seconds,
        exit_soon: Callable[[], None] | None = None,
    ) -> None:
        """Prepare to look at the run in `storage`.

        holder: id of the driver's lease; empty: of a driver without one, so that the attempt alone counts. exit_soon:
        called when this rank must end, in a process that is no driver's; only such a one can be cut off.
        """
        self._storage, self._attempt, self._holder, self._clock = storage, attempt, holder, clock
        self._exit_soon = exit_soon
        self._heartbeat = Heartbeat(storage, clock)
        self._looked_at = clock()  # the begin of the newest look that was answered
        self._answers = 0
        self._still_seconds = 0.0  # for which the heartbeat was not seen to move
        self._over: Superseded | None = None
        self._lock = threading.Lock()
        self._poll = (0, 0, clock())  # moves and answers at the last poll, and its time
        self._silent_seconds = 0.0
        self._closed = threading.Event()

    @classmethod
    def of(cls, attempt: Attempt, *, exits: bool = False) -> Self:
        """Return a fence for a rank of `attempt`, and start its thread.

        exits: end this process, which is the rank's alone, where its error reaches nobody.
        """
        exit_soon = (lambda: limit_exit(EXIT_SECONDS, 1)) if exits else None
        fence = cls(open_storage(attempt.folder), attempt.number, attempt.holder, exit_soon=exit_soon)
        threading.Thread(target=fence._watch, name="fence", daemon=True).start()
        return fence

    @property
    def is_over(self) -> bool:
        """Report whether this rank must end."""
        return self._over is not None

    def close(self) -> None:
        """End the thread soon; it is not waited for, because it may be waiting for an answer."""
        self._closed.set()

    def check(self, recent_seconds: float = 0.0) -> None:
        """Return where this rank may write. See protocol.Permit."""
        if self._over is not None:
            raise self._over
        if self._answers == 0 or self._clock() - self._looked_at >= recent_seconds:
            self.look()
        age = self._heartbeat.age_seconds()
        if self._holder and age > FRESH_SECONDS:
            raise Unreachable(
                f"the driver of the run was not seen to live for {age:.0f} s; nothing is written"
            )

    def look(self) -> None:
        """Read attempt and lease. Raises Superseded where this rank must end, Unreachable without an answer."""
        with self._lock:
            begin = self._clock()
            try:
                text = self._find_end(begin)
            except Unreachable:
                raise
            except StorageError as error:  # A folder has no other error than this for a server that is away.
                raise Unreachable(str(error)) from error
            self._looked_at = begin
            self._answers += 1
        if text is not None:
            self._end(text)
        if self._over is not None:
            raise self._over

    def raise_if_over(self, moves: int) -> None:
        """Raise Superseded where this rank must end. Never waits for the storage; call it often.

        moves: a number that changes while the rank makes progress.
        """
        before, now = self._poll, self._clock()
        self._poll = (moves, self._answers, now)
        if self._poll[:2] != before[:2]:
            self._silent_seconds = 0.0
        else:
            self._silent_seconds += min(now - before[2], MAX_POLL_SECONDS)
        if self._silent_seconds >= CUT_OFF_SECONDS and self._exit_soon is not None:
            self._end(
                f"{self._storage.location} has not answered for {CUT_OFF_SECONDS:g} s, and nothing has moved: this rank is cut off"
            )
        if self._over is not None:
            raise self._over

    def _find_end(self, begin: float) -> str | None:
        """Read both objects; return why this rank must end, or None. Raises StorageError."""
        newest = _attempt_in(self._storage.read(RUN_FILE))
        if newest > self._attempt:
            return f"attempt {newest} of the run has begun: attempt {self._attempt} ends"
        if not self._holder:
            return None
        moved, content = self._heartbeat.look()
        holder = None if content is None else Holder.parse(content)
        if holder is not None and holder.id != self._holder:
            return f"another driver trains the run now ({holder}): attempt {self._attempt} ends"
        if holder is None and content is not None:
            return f"the driver has given the run up: attempt {self._attempt} ends"
        # A machine that has slept has not waited for its driver: one look counts for two intervals at most.
        elapsed = min(begin - self._looked_at, 2 * LOOK_SECONDS)
        self._still_seconds = 0.0 if moved else self._still_seconds + elapsed
        # Where nothing can be written, no driver can renew its lease, and no other one can take it.
        if self._still_seconds < END_SECONDS or not self._takes_writes():
            return None
        return f"the driver has not renewed its lease for {self._still_seconds:.0f} s: attempt {self._attempt} ends"

    def _takes_writes(self) -> bool:
        name = f"{TOKENS_FOLDER}/probe-{uuid.uuid4().hex}"
        try:
            if not self._storage.is_gone():
                self._storage.write(name, PROBE)
        except StorageError:
            return False
        with suppress(StorageError):
            self._storage.delete(name)
        return True

    def _end(self, text: str) -> None:
        if self._over is None:
            self._over = Superseded(text)
            if self._exit_soon is not None:
                self._exit_soon()

    def _watch(self) -> None:
        pause = random.uniform(0, LOOK_SECONDS)
        while not self._closed.wait(pause):
            try:
                self.look()
            except Superseded:
                return
            except StorageError:  # The next look may be answered.
                pass
            pause = LOOK_SECONDS * random.uniform(1 - JITTER, 1 + JITTER)


def _attempt_in(run: bytes | None) -> int:
    """Return the attempt that a run.json records; 0 where there is none, which another watch reports."""
    try:
        return int(json.loads(run or b"{}").get("attempt", 0))
    except (ValueError, TypeError, AttributeError):
        return 0
