"""The spool: metrics are appended to a log of the run first and uploaded later, so that no server can slow a rank.

Each line is one JSON object. Rank 0 appends, the driver follows. Every attempt of a run appends to the same
log: entries keep their original times, and the uploader skips what the server already has
(mlflow/upload.py).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from resnet_dist.runs.page import predictions_file
from resnet_dist.runs.storage.protocol import ALWAYS, Log, Permit, Storage
from resnet_dist.system.redact import redact

if TYPE_CHECKING:  # It imports torch, which a command that shows a spool need not wait for.
    from resnet_dist.train.predictions import Predictions

log = logging.getLogger(__name__)

REMOVED = "removed"
EVALUATION = "eval/samples"  # a metric that every evaluation has
WRITE_SECONDS = 10.0  # for predictions that are being written when the training ends


@dataclass(frozen=True)
class Entry:
    """One line: the metrics of a step, or a quantity of a step by layer, or a note to the person.

    An entry with time alone marks the beginning of an attempt.
    """

    time_ms: int
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    # By quantity, then by layer. Kept apart from `metrics` because MLflow would draw a chart for every layer.
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    note: str | None = None
    # The first step of an attempt: its number, the seconds since the cause of its start, in all and by phase, and tags
    # of the machines that it runs on.
    start: dict[str, Any] | None = None
    # Of the checkpoint of this step: the SHA-256 of its model, or REMOVED.
    checkpoint: str | None = None


class Spool:
    """The Tracker of rank 0.

    Writing never raises: a full disk loses metrics, but does not stop the training.
    """

    def __init__(self, lines: Log, permit: Permit = ALWAYS, evaluations: Storage | None = None) -> None:
        """Append to `lines`. evaluations: the place for predictions; None: they are dropped."""
        self._lines = lines.open(permit)  # The driver sees each entry at once, or after some seconds.
        self._permit, self._evaluations = permit, evaluations
        self._writers: list[threading.Thread] = []
        self._failed = False
        self._lock = threading.Lock()  # The thread that writes checkpoints appends notes too.
        self._append({})  # Show the driver that rank 0 has begun.

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._append({"step": step, "metrics": metrics})

    def log_layers(self, name: str, values: dict[str, float], step: int) -> None:
        self._append({"step": step, "layers": {name: values}})

    def log_predictions(self, predictions: Predictions, step: int) -> None:
        """Write predictions in a thread of their own: a storage may take long."""
        if self._evaluations is None:
            return
        # A daemon thread: a storage that never answers must not keep the process alive.
        writer = threading.Thread(
            target=self._write_predictions, args=(predictions, step), name="predictions", daemon=True
        )
        try:
            writer.start()
        except RuntimeError as error:  # The user may have no more threads.
            self.note(f"no figures of the evaluation at step {step}: {error}")
            return
        self._writers = [*(one for one in self._writers if one.is_alive()), writer]

    def _write_predictions(self, predictions: Predictions, step: int) -> None:
        assert self._evaluations is not None
        try:
            self._permit.check()
            self._evaluations.write(predictions_file(step), predictions.to_bytes())
        except Exception as error:  # A figure must not end a training.
            self.note(f"no figures of the evaluation at step {step}: {error}")

    def log_checkpoint(self, step: int, sha256: str | None) -> None:
        self._append({"step": step, "checkpoint": REMOVED if sha256 is None else sha256})

    def note(self, text: str) -> None:
        self._append({"note": redact(text)})

    def log_start(
        self, start: dict[str, Any], step: int, metrics: dict[str, float], note: str | None
    ) -> None:
        """Record the first step of an attempt, with metrics and a note where a person should see it."""
        self._append({"step": step, "start": start, "metrics": metrics, "note": note})

    def flush(self) -> None:
        self._lines.flush()

    def close(self) -> None:
        deadline = time.monotonic() + WRITE_SECONDS
        for writer in self._writers:
            writer.join(max(0.0, deadline - time.monotonic()))
        if late := sum(writer.is_alive() for writer in self._writers):
            self.note(
                f"no figures of the last {late} evaluation(s): the storage took longer than {WRITE_SECONDS:.0f} s"
            )
        try:
            self._lines.close()
        except OSError as error:
            self._warn(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, value: dict[str, Any]) -> None:
        try:
            with self._lock:
                line = json.dumps({"time_ms": time.time_ns() // 1_000_000, **value}) + "\n"
                self._lines.write(line.encode())
        # ValueError: another thread has closed the file.
        except (OSError, ValueError) as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._failed:  # Warn once: a warning per entry would fill the log.
            log.warning("metrics are not recorded from here on: %s", error)
        self._failed = True


class Follower:
    """Reads a spool while it grows."""

    def __init__(self, lines: Log) -> None:
        self._lines = lines
        self._position = ""

    def read(self) -> list[Entry]:
        """Return the entries completed since the last call. Raises OSError where the spool cannot be read."""
        data, self._position = self._lines.read(self._position)
        return [entry for line in data.splitlines() if (entry := _parse(line)) is not None]

    def skip(self) -> None:
        """Skip all entries that are already there."""
        self._position = self._lines.end()


def start_seconds(entries: Iterable[Entry]) -> dict[int, float]:
    """Return the seconds to the first step of each attempt that took one, by its number."""
    starts = [entry.start for entry in entries if entry.start is not None]
    return {start["attempt"]: start["seconds"] for start in starts}


def start_tags(entries: Iterable[Entry]) -> dict[str, str]:
    """Return the tags of the machines of the newest attempt that took a step."""
    tags: dict[str, str] = {}
    for entry in entries:
        if entry.start is not None:
            tags = entry.start.get("tags") or tags
    return tags


def has_steps(spool: Log) -> bool:
    """Report whether the metrics of any step were recorded."""
    return any(
        entry.step is not None and entry.metrics and entry.start is None for entry in Follower(spool).read()
    )


def last_step(spool: Log) -> int | None:
    """Return the newest step of the newest attempt that took one; None before the first."""
    step: int | None = None
    for entry in Follower(spool).read():
        if entry.start is not None:
            step = entry.step
        elif entry.step is not None and entry.metrics:
            step = max(step or 0, entry.step)
    return step


def evaluated_steps(spool: Log) -> set[int]:
    """Return the steps whose evaluation was recorded."""
    entries = Follower(spool).read()
    return {one.step for one in entries if one.step is not None and EVALUATION in one.metrics}


def read_layers(spool: Log, name: str) -> dict[int, dict[str, float]]:
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
