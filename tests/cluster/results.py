"""The result of a run, as MLflow and the run's storage have it: compare two, and measure the pause after a fault."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import mlflow

from resnet_dist.runs.folder import RunFolder
from resnet_dist.tracking.spool import Entry, Follower
from resnet_dist.train.checkpoint.folder import MANIFEST, MODEL_FILE, list_checkpoints

Points = dict[str, list[tuple[int, float]]]  # step and value by metric


@dataclass(frozen=True)
class Result:
    """The end of a run: its status, its points but those of speed, and the checksum of its last weights."""

    status: str
    points: Points
    weights: str

    @classmethod
    def of(cls, tracking: str, run: RunFolder) -> Result:
        client = mlflow.MlflowClient(tracking)
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        (found,) = client.search_runs(experiments, f"attributes.run_name = '{run.name}'")
        names = [name for name in found.data.metrics if not name.startswith(("perf/", "system/"))]
        histories = {name: client.get_metric_history(found.info.run_id, name) for name in names}
        points = {
            name: sorted((point.step, point.value) for point in history)
            for name, history in histories.items()
        }
        return cls(found.info.status, points, checksum_of_model(run))

    def num_lost(self, whole: Result) -> int:
        """Return the number of points of `whole` that are missing here."""
        return sum(len(whole.steps(name) - self.steps(name)) for name in whole.points)

    def num_doubled(self, whole: Result) -> int:
        """Return the number of points that are here twice, or that `whole` does not have."""
        return sum(
            len(points) - len(whole.steps(name) & self.steps(name)) for name, points in self.points.items()
        )

    def steps(self, name: str) -> set[int]:
        return {step for step, _ in self.points.get(name, [])}

    def difference(self, whole: Result) -> float:
        """Return the largest difference of a value from that of `whole`, relative to it; 0.0: all are bitwise equal."""
        pairs = [
            (value, dict(self.points.get(name, [])).get(step, value))
            for name, points in whole.points.items()
            for step, value in points
        ]
        return max(abs(ours - theirs) / max(abs(theirs), 1e-6) for theirs, ours in pairs)


def checksum_of_model(run: RunFolder) -> str:
    """Return the SHA-256 of the weights in the newest checkpoint of a run."""
    manifest = run.checkpoints.read(f"{list_checkpoints(run.checkpoints)[-1]}/{MANIFEST}")
    assert manifest is not None
    return str(json.loads(manifest)["sha256"][MODEL_FILE])


def journal(run: RunFolder) -> list[Entry]:
    return Follower(run.spool).read()


def next_step_time(entries: Sequence[Entry], fault: float) -> float:
    """Return the time of the first step after a fault, in seconds since 1970.

    It is the first step of the attempt that began after the fault, or where none began, the first after the pause.
    """
    after = [entry for entry in entries if entry.time_ms / 1000 > fault]
    begins = [number for number, entry in enumerate(after) if entry.step is None and entry.note is None]
    for begin in begins:
        if steps := [entry for entry in after[begin:] if entry.step is not None]:
            return steps[0].time_ms / 1000
    times = [fault, *(entry.time_ms / 1000 for entry in after if entry.step is not None)]
    assert len(times) > 1, "no step after the fault"
    return max(zip(times, times[1:], strict=False), key=lambda pair: pair[1] - pair[0])[1]


def longest_pause(entries: Sequence[Entry]) -> float:
    """Return the longest time between two steps in the journal, in seconds."""
    times = [entry.time_ms / 1000 for entry in entries if entry.step is not None and entry.metrics]
    return max(after - before for before, after in zip(times, times[1:], strict=False))
