"""The position of every rank, published through the store of the process group, for all watchdogs to read.

A rank publishes every few seconds, from a thread. It reads the others' positions only while its own rank stands
still, because with many ranks that is most of the traffic.
"""

from __future__ import annotations

import json
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

import resnet_dist
from resnet_dist.train.watch.progress import NEXT_BATCH, Progress
from resnet_dist.world import World

PACKAGE = str(Path(resnet_dist.__file__).parent)
MAX_FRAMES = 10  # of one thread
DECODERS = "decode"  # how the names of the loader's threads begin
POLLS_TO_ANSWER = 4  # A rank that has not published for so many polls is silent.
STORE_SECONDS = 5.0  # limit for one exchange with the store


@dataclass(frozen=True)
class Position:
    """The position of a rank, as it publishes it. Without a phase: nothing but the host is known."""

    moves: int  # phases entered so far
    step: int
    phase: str
    line: str  # the line of this package that its training thread is at
    beat: int  # number of times that it has published
    host: str = ""
    stack: tuple[str, ...] = ()  # innermost last: of the training thread, and of a decoder that it waits for

    @property
    def where(self) -> str:
        """The step, the phase and the line, as text."""
        return f"step {self.step}, {self.phase}" + (f" ({self.line})" if self.line else "")


@dataclass(frozen=True)
class Reading:
    """The newest known positions of all ranks, by rank, and the ranks that do not answer."""

    positions: tuple[Position, ...]
    silent: tuple[int, ...] = ()
    store_answers: bool = True
    is_complete: bool = True  # whether there were polls enough to know who is silent

    @property
    def writer(self) -> int | None:
        """The lowest rank that answers; None where nobody can know it."""
        if not self.store_answers:
            return None
        return min(set(range(len(self.positions))) - set(self.silent), default=None)


def position_of(progress: Progress, thread: threading.Thread, beat: int = 0) -> Position:
    """Return the position of this rank, whose training runs in `thread`."""
    # Read the number first: a phase that is entered now makes it too small, and the next look corrects it.
    moves, step, phase = progress.moves, progress.step, progress.phase
    frames = list(_frames_of(thread))
    own = [frame for frame in frames if frame.f_code.co_filename.startswith(PACKAGE)]
    stack = [_describe(frame, full=True) for frame in frames[-MAX_FRAMES:]]
    if phase == NEXT_BATCH:
        stack += _busy_decoder()
    line = _describe(own[-1]) if own else ""
    return Position(moves, step, phase, line, beat, platform.node(), tuple(stack))


def _frames_of(thread: threading.Thread) -> Iterator[FrameType]:
    """Yield the frames of a thread, outermost first. Reads no source file, as `traceback` would: the disk may hang."""
    frames = []
    frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return reversed(frames)


def _busy_decoder() -> list[str]:
    """Return the stack of one thread of the loader that is at work: the loop waits for what it does."""
    for thread in threading.enumerate():
        if thread.name.startswith(DECODERS):
            frames = list(_frames_of(thread))
            if any(frame.f_code.co_filename.startswith(PACKAGE) for frame in frames):
                return [f"{thread.name}: {_describe(frame, full=True)}" for frame in frames[-MAX_FRAMES:]]
    return []


def _describe(frame: FrameType, *, full: bool = False) -> str:
    path = Path(frame.f_code.co_filename)
    name = "/".join(path.parts[-3:]) if full else path.name
    return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"


class Board:
    """The exchange of positions between the ranks.

    The store lives in one process. If that process hangs, the thread here hangs with it; the watchdog does not.
    """

    def __init__(self, world: World, position: Callable[[int], Position], poll_seconds: float) -> None:
        self._position, self._poll_seconds = position, poll_seconds
        self._own, self._keys = str(world.rank), [str(rank) for rank in range(world.world_size)]
        # Until all have published once, look more often, but not so often that many ranks load the store.
        self._first_poll_seconds = min(poll_seconds, (20 + world.world_size) / 100)
        # Open a connection of our own: on the group's, a thread that waits for another rank blocks all other threads.
        store = dist.distributed_c10d._get_default_store().clone()
        self._store = dist.PrefixStore("watchdog", store)  # type: ignore[attr-defined]
        self._readings: tuple[list[Position], ...] = ()  # the newest, of the current stall
        self._hosts: list[str] = []  # of all ranks, once all have published
        self._missing: list[int] = []  # ranks that have published nothing yet
        self._answered_at = time.monotonic()
        self.reads = False  # Set it while the positions of the others are needed.
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def read(self) -> Reading:
        """Return every rank's position, and the ranks that have not published in the last polls."""
        readings = self._readings  # The thread replaces it.
        # Without a reading of this stall nothing but the hosts is known.
        hosts = [Position(-1, -1, "", "", 0, host) for host in self._hosts or [""] * len(self._keys)]
        known = tuple(readings[-1] if readings else hosts)
        age = time.monotonic() - self._answered_at
        if age > POLLS_TO_ANSWER * self._poll_seconds + STORE_SECONDS:
            # Rank 0 keeps the store, or is the nearest to it.
            return Reading(known, (0,), store_answers=False)
        if len(readings) < POLLS_TO_ANSWER:
            return Reading(known, tuple(self._missing), is_complete=bool(self._missing))
        before, last = readings[0], readings[-1]
        silent = tuple(rank for rank, position in enumerate(last) if position.beat == before[rank].beat)
        return Reading(known, silent)

    def _run(self) -> None:
        beat = 0
        while True:
            beat += 1
            try:
                self._store.set(self._own, json.dumps(asdict(self._position(beat))))
                if self.reads or not self._hosts:
                    self._read_all()
                else:
                    self._readings = ()
                    self._store.check([self._own])  # `set` returns before the store has answered.
                self._answered_at = time.monotonic()
            except RuntimeError:
                return  # the process with the store has ended: the next collective reports it
            if self._stop.wait(self._poll_seconds if self._hosts else self._first_poll_seconds):
                return

    def _read_all(self) -> None:
        if not self._store.check(self._keys):
            if self.reads:
                self._missing = [rank for rank, key in enumerate(self._keys) if not self._store.check([key])]
            return
        self._missing = []
        positions = [_parse(text) for text in self._store.multi_get(self._keys)]
        self._hosts = [position.host for position in positions]
        if self.reads:
            self._readings = (*self._readings, positions)[-POLLS_TO_ANSWER:]


def _parse(text: bytes) -> Position:
    value = json.loads(text)
    return Position(**{**value, "stack": tuple(value["stack"])})
