"""The spool: metrics are appended to a file first and uploaded later, so that no server can slow a rank.

Each line is one JSON object. Rank 0 appends, the driver follows. Every attempt of a run appends to the same
file: entries keep their original times, and the uploader skips what the server already has
(mlflow/upload.py).
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

from resnet_dist.system.redact import redact

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line: the metrics of a step, or a quantity of a step by layer, or a note to the person.

    An entry with none of these marks the beginning of an attempt.
    """

    time_ms: int
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    # By quantity, then by layer. Kept apart from `metrics` because MLflow would draw a chart for every layer.
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str | None = None


class Spool:
    """The Tracker of rank 0.

    Writing never raises: a full disk loses metrics, but does not stop the training.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        end_torn_line(path)
        self._file = path.open("a", buffering=1)  # Line-buffered: the driver sees each entry at once.
        self._failed = False
        self._lock = threading.Lock()  # The thread that writes checkpoints appends notes too.
        self._append({})  # Show the driver that rank 0 has begun.

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._append({"step": step, "metrics": metrics})

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None:
        self._append({"step": step, "layers": {name: values}})

    def note(self, text: str) -> None:
        self._append({"note": redact(text)})

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `_append` has already warned.
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
        # ValueError: another thread has closed the file.
        except (OSError, ValueError) as error:
            if not self._failed:  # Warn once: a warning per entry would fill the log.
                log.warning("metrics are not recorded from here on: %s", error)
            self._failed = True


def end_torn_line(path: Path) -> None:
    """End the half line that a killed writer may have left, so that the next line is whole."""
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
        """Return the entries completed since the last call. Raises OSError where the file cannot be read."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        return [entry for line in whole.splitlines() if (entry := _parse(line)) is not None]

    def skip(self) -> None:
        """Skip all entries that are already in the file."""
        self.read()


def read_layers(spool: Path, name: str) -> dict[int, dict[str, float]]:
    """Return quantity `name` by step, then by layer. A step that a restart repeated has its last values."""
    return {
        entry.step: entry.layers[name]
        for entry in Follower(spool).read()
        if entry.step is not None and name in entry.layers
    }


def _parse(line: bytes) -> Entry | None:
    try:
        return Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None  # A writer was killed in the middle of this line.
