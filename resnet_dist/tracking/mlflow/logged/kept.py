"""The checkpoints of a run with their metrics, as its journal and its folder have them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from resnet_dist.runs.folder import RunFolder
from resnet_dist.tracking.spool import REMOVED, Entry
from resnet_dist.train.checkpoint.folder import list_checkpoints, model_checksum, step_of

# The prefixes of the metrics that tell one checkpoint from another; speeds and machines do not.
PREFIXES = ("eval/", "train/")
# Steps whose metrics are remembered: their checkpoint may still be being written.
MAX_STEPS_WAITING = 1000

Metrics = dict[str, tuple[float, int]]  # by name: the value, and its time in milliseconds


@dataclass(frozen=True)
class KeptCheckpoint:
    """A checkpoint that was written, and the metrics of its step."""

    step: int
    sha256: str  # of its model
    removed: bool = False  # since then
    metrics: Metrics = field(default_factory=dict)


class Checkpoints:
    """The checkpoints that the entries of a journal name, in the order in which they come."""

    def __init__(self) -> None:
        self.by_step: dict[int, KeptCheckpoint] = {}
        # Of a step that a restart repeats, MLflow has the first values: a metric is sent once.
        self._metrics: dict[int, Metrics] = defaultdict(dict)

    def add(self, entries: Iterable[Entry]) -> set[int]:
        """Take entries; return the steps of the checkpoints that they have changed."""
        changed = set()
        for entry in entries:
            if entry.step is None:
                continue
            if entry.checkpoint is not None:
                self._set(entry.step, entry.checkpoint)
                changed.add(entry.step)
            elif self._take_metrics(entry):
                changed.add(entry.step)
        for step in [*self._metrics][: max(0, len(self._metrics) - MAX_STEPS_WAITING)]:
            del self._metrics[step]
        return changed

    def compare(self, run: RunFolder) -> set[int]:
        """Take what the folder has and the journal has not: a writer that was killed; return the steps that changed."""
        names = {step_of(name): name for name in list_checkpoints(run.checkpoints)}
        changed = {step for step, one in self.by_step.items() if not one.removed and step not in names}
        for step in changed:
            self._set(step, REMOVED)
        known = {step for step, one in self.by_step.items() if not one.removed}
        for step in names.keys() - known:
            if (sha256 := model_checksum(run.checkpoints, names[step])) is not None:
                self._set(step, sha256)
                changed.add(step)
        return changed

    def _set(self, step: int, what: str) -> None:
        known = self.by_step.get(step) or KeptCheckpoint(step, "", metrics=self._metrics.pop(step, {}))
        is_removed = what == REMOVED
        self.by_step[step] = replace(known, sha256=known.sha256 if is_removed else what, removed=is_removed)

    def _take_metrics(self, entry: Entry) -> bool:
        """Take the metrics of an entry; report whether they belong to a checkpoint that is known already."""
        assert entry.step is not None
        known = self.by_step.get(entry.step)
        metrics = self._metrics[entry.step] if known is None else known.metrics
        fresh = {
            name: (value, entry.time_ms)
            for name, value in entry.metrics.items()
            if name.startswith(PREFIXES) and name not in metrics and math.isfinite(value)
        }
        metrics |= fresh
        if known is None and not metrics:
            del self._metrics[entry.step]
        return known is not None and bool(fresh)
