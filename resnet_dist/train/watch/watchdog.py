"""Name the rank that hangs, instead of waiting for it forever.

A rank that hangs (a lost disk, a dead driver, a deadlock) blocks all others in their next collective, where no Python
code runs. So each rank is watched from a thread other than the one that trains: it publishes the position of its rank,
and once nothing has moved for `timeout_seconds` it compares with the others. Ranks go through the same phases in the
same order: the one that has entered fewest is behind.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

import resnet_dist
from resnet_dist.errors import TrainingError
from resnet_dist.train.watch.progress import Progress
from resnet_dist.world import World

PACKAGE = str(Path(resnet_dist.__file__).parent)
POLLS_PER_TIMEOUT = 20
MAX_POLL_SECONDS = 30.0  # between two polls
POLLS_TO_ANSWER = 4  # polls in which a live rank publishes again
STORE_SECONDS = 5.0  # that one exchange with the store may take


class Stalled(TrainingError):
    """The error for ranks that hang. Their threads may never return, so the process must exit without joining them."""


@dataclass(frozen=True)
class Position:
    """The position of a rank, as it publishes it."""

    moves: int  # phases entered so far
    step: int
    phase: str
    line: str  # the line of this package that its training thread is at
    beat: int  # how often it has published


class Watchdog:
    """The watch over this rank's training thread. Call `look` repeatedly, from another thread."""

    def __init__(
        self,
        progress: Progress,
        thread: threading.Thread,
        world: World,
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress, self._thread, self._world = progress, thread, world
        self._timeout, self._clock = timeout_seconds, clock
        self.poll_seconds = min(timeout_seconds / POLLS_PER_TIMEOUT, MAX_POLL_SECONDS)
        self._moves = -1
        self._still_for = 0.0
        self._looked_at = clock()
        self._board = _Board(world, self.position, self.poll_seconds) if world.world_size > 1 else None

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def position(self, beat: int = 0) -> Position:
        frames = traceback.extract_stack(sys._current_frames().get(self._thread.ident or 0))
        own = [frame for frame in frames if frame.filename.startswith(PACKAGE)]
        line = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else ""
        return Position(self._progress.moves, self._progress.step, self._progress.phase, line, beat)

    def look(self) -> None:
        """Raise Stalled once nothing has moved for as long as the phase may take."""
        now = self._clock()
        # Limit the time between two looks: a machine that slept, or a job that was paused, has not stalled.
        elapsed = min(now - self._looked_at, 2 * self.poll_seconds)
        self._looked_at = now
        if self._progress.moves != self._moves:
            self._moves, self._still_for = self._progress.moves, 0.0
            return
        self._still_for += elapsed
        allowed = self._timeout * self._progress.patience
        # Ranks stop moving at different moments: wait until each has published where it stands now.
        if self._still_for >= allowed + POLLS_TO_ANSWER * self.poll_seconds:
            raise Stalled(self._describe_stall(allowed))

    def _describe_stall(self, seconds: float) -> str:
        end = f"(train.stall_timeout_seconds={self._timeout:g})"
        here = self.position()
        if self._board is None:
            return f"nothing moved for {seconds:g} s: at step {_describe(here)} {end}"
        positions, silent = self._board.read()
        if silent:
            return (
                f"{_ranks_have(silent)} not answered for {seconds:g} s, while rank {self._world.rank} is at step "
                f"{_describe(here)} {end}"
            )
        fewest = min(position.moves for position in positions)
        behind = [rank for rank, position in enumerate(positions) if position.moves == fewest]
        where = _describe(positions[behind[0]])
        if len(behind) == len(positions):
            lines = [position.line for position in positions]
            if len(set(lines)) > 1:  # in one phase, such as the start, some ranks are further on
                first = positions[0]
                each = ", ".join(f"rank {rank} ({line or '?'})" for rank, line in enumerate(lines))
                return (
                    f"no rank moved for {seconds:g} s: at step {first.step}, {first.phase}, are {each} {end}"
                )
            return f"no rank moved for {seconds:g} s: all are at step {where} {end}"
        return f"{_ranks_have(behind)} not moved for {seconds:g} s: at step {where}; the others wait {end}"


def _describe(position: Position) -> str:
    return f"{position.step}, {position.phase}" + (f" ({position.line})" if position.line else "")


def _ranks_have(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names} has" if len(ranks) == 1 else f"ranks {names} have"


class _Board:
    """The exchange of positions between the ranks, through the store of the process group.

    The store lives in one process. If that process hangs, the thread here hangs with it; the watchdog does not.
    """

    def __init__(self, world: World, position: Callable[[int], Position], poll_seconds: float) -> None:
        self._position, self._poll_seconds = position, poll_seconds
        self._own, self._keys = str(world.rank), [str(rank) for rank in range(world.world_size)]
        # Open a connection of our own: on the group's, a thread that waits for another rank blocks all other threads.
        store = dist.distributed_c10d._get_default_store().clone()
        self._store = dist.PrefixStore("watchdog", store)  # type: ignore[attr-defined]
        self._readings: deque[list[Position]] = deque(maxlen=POLLS_TO_ANSWER)
        self._read_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def read(self) -> tuple[list[Position], list[int]]:
        """Return every rank's position, and the ranks that have not published in the last polls."""
        age = time.monotonic() - self._read_at
        if not self._readings or age > POLLS_TO_ANSWER * self._poll_seconds + STORE_SECONDS:
            return [], [0]  # the store is silent: rank 0 keeps it, or is the nearest to it
        last = self._readings[-1]
        if len(self._readings) < POLLS_TO_ANSWER:
            return last, []
        return last, [
            rank for rank, position in enumerate(last) if position.beat == self._readings[0][rank].beat
        ]

    def _run(self) -> None:
        beat = 0
        while True:
            beat += 1
            try:
                self._store.set(self._own, json.dumps(asdict(self._position(beat))))
                if self._store.check(self._keys):
                    texts = self._store.multi_get(self._keys)
                    self._readings.append([Position(**json.loads(text)) for text in texts])
                    self._read_at = time.monotonic()
            except RuntimeError:
                return  # the process with the store has ended: the next collective reports it
            if self._stop.wait(self._poll_seconds):
                return
