"""A rank that stands still is named, not waited for for ever.

A rank that hangs (a lost disk, a dead driver, a deadlock) holds up all others in their next collective, where no
Python code runs. So each rank is watched from another thread than the one that trains: it publishes where its
rank is, and once nothing has moved for `timeout` it compares with the others. Ranks go through the same phases in
the same order: the one that entered fewest is behind.
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
LONGEST_POLL_SECONDS = 30.0
POLLS_TO_ANSWER = 4
STORE_SECONDS = 5.0


class Stalled(TrainingError):
    """Ranks that stood still: their threads may hang for ever, so the process must be left, not wound up."""


@dataclass(frozen=True)
class Position:
    """Where a rank is, as it says itself."""

    moves: int
    step: int
    phase: str
    line: str  # of this package, where its training thread is
    beat: int  # how often it has said so


class Watchdog:
    """Watches the training thread of this rank. Call `look` again and again from another thread."""

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
        self.poll_seconds = min(timeout_seconds / POLLS_PER_TIMEOUT, LONGEST_POLL_SECONDS)
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
        """Raises Stalled once nothing has moved for as long as the phase may take."""
        now = self._clock()
        # Not the clock itself: a machine that slept, or a job that was paused, has not stalled.
        elapsed = min(now - self._looked_at, 2 * self.poll_seconds)
        self._looked_at = now
        if self._progress.moves != self._moves:
            self._moves, self._still_for = self._progress.moves, 0.0
            return
        self._still_for += elapsed
        allowed = self._timeout * self._progress.patience
        # The others began to stand still at other moments: let all say once more where they are.
        if self._still_for >= allowed + POLLS_TO_ANSWER * self.poll_seconds:
            raise Stalled(self._verdict(allowed))

    def _verdict(self, seconds: float) -> str:
        end = f"(train.stall_timeout_seconds={self._timeout:g})"
        here = self.position()
        if self._board is None:
            return f"nothing moved for {seconds:g} s: at step {_describe(here)} {end}"
        positions, silent = self._board.read()
        if silent:
            return (
                f"{_ranks(silent)} not answering since {seconds:g} s, while rank {self._world.rank} is at step "
                f"{_describe(here)} {end}"
            )
        fewest = min(position.moves for position in positions)
        behind = [rank for rank, position in enumerate(positions) if position.moves == fewest]
        where = _describe(positions[behind[0]])
        if len(behind) == len(positions):
            lines = [position.line for position in positions]
            if len(set(lines)) > 1:  # one phase, such as the start, in which some have come further
                first = positions[0]
                each = ", ".join(f"rank {rank} ({line or '?'})" for rank, line in enumerate(lines))
                return (
                    f"no rank moved for {seconds:g} s: at step {first.step}, {first.phase}, are {each} {end}"
                )
            return f"no rank moved for {seconds:g} s: all are at step {where} {end}"
        return f"{_ranks(behind)} standing still since {seconds:g} s at step {where}; the others wait {end}"


def _describe(position: Position) -> str:
    return f"{position.step}, {position.phase}" + (f" ({position.line})" if position.line else "")


def _ranks(ranks: list[int]) -> str:
    names = ", ".join(map(str, ranks))
    return f"rank {names} is" if len(ranks) == 1 else f"ranks {names} are"


class _Board:
    """Where every rank says again and again where it is: the store of the process group.

    The store lives in one process. Should that one hang, the thread in here hangs with it; the watchdog does not.
    """

    def __init__(self, world: World, position: Callable[[int], Position], poll_seconds: float) -> None:
        self._position, self._poll_seconds = position, poll_seconds
        self._own, self._keys = str(world.rank), [str(rank) for rank in range(world.world_size)]
        # A connection of its own: on the group's, a thread that waits for a word of another rank holds up all others.
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
        """Every rank's position, and the ranks that said nothing in the last polls."""
        age = time.monotonic() - self._read_at
        if not self._readings or age > POLLS_TO_ANSWER * self._poll_seconds + STORE_SECONDS:
            return [], [0]  # which keeps the store, or hears of it first
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
                return  # the process with the store has ended: the next collective says so
            if self._stop.wait(self._poll_seconds):
                return
