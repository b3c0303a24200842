"""The spool: metrics are appended to a file first and uploaded later, so that no server can stop or slow a rank.

One JSON object a line. Rank 0 appends, the driver follows. After a restart the same file goes on: lines keep
their original times, and what the server has already is skipped (see upload.py).
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line: metrics of a step, a quantity of a step by layer, a note to the person, or nothing: an attempt begins."""

    time_ms: int
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    """By quantity, then by layer. Not for charts: hundreds of layers would be hundreds of them."""
    note: str | None = None


class Spool:
    """The Tracker of rank 0. Never raises: a full disk costs metrics, not the training."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        end_torn_line(path)
        self._file = path.open("a", buffering=1)  # a line is written when it is complete
        self._failed = False
        self._lock = threading.Lock()  # the thread that writes checkpoints has notes too
        self._append({})  # the driver sees that rank 0 has begun

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._append({"step": step, "metrics": metrics})

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None:
        self._append({"step": step, "layers": {name: values}})

    def note(self, text: str) -> None:
        self._append({"note": text})

    def close(self) -> None:
        with contextlib.suppress(OSError):  # told by the line that could not be written
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, value: dict[str, Any]) -> None:
        try:
            with self._lock:
                self._file.write(json.dumps({"time_ms": time.time_ns() // 1_000_000, **value}) + "\n")
        except (OSError, ValueError) as error:  # ValueError: closed, and a thread still had a word
            if not self._failed:  # once: a full disk would fill the log too
                log.warning("metrics are not recorded from here on: %s", error)
            self._failed = True


def end_torn_line(path: Path) -> None:
    """A writer that was killed may have left half a line: end it, so that the next one is whole."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, 2)
            if file.read() != b"\n":
                file.write(b"\n")


class Follower:
    """Reads a spool while it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def read(self) -> list[Entry]:
        """The lines completed since the last call. Raises OSError where the file cannot be read."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        return [entry for line in whole.splitlines() if (entry := _parse(line)) is not None]

    def skip(self) -> None:
        """Leave out what is there already."""
        self.read()


def read_layers(spool: Path, name: str) -> dict[int, dict[str, float]]:
    """Quantity `name` by step and layer. Steps that a restart ran again are there once, as they were last."""
    return {
        entry.step: entry.layers[name]
        for entry in Follower(spool).read()
        if entry.step is not None and name in entry.layers
    }


def _parse(line: bytes) -> Entry | None:
    try:
        return Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None  # the torn line of a writer that was killed
