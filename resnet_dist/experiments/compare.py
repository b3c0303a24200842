"""Several runs side by side: the fields that differ, their metrics, and their curves on common axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resnet_dist.experiments.curves import finite, limits, sparkline
from resnet_dist.experiments.listing import aligned, run_json, short
from resnet_dist.experiments.numbers import duration_text, metric_text
from resnet_dist.tracking.logged_run import LoggedRun, Point, differing

Histories = Mapping[str, Sequence[Sequence[Point]]]  # by metric: the history of each run


def side_by_side(runs: Sequence[LoggedRun]) -> list[str]:
    """Return a table with a column for each run: the state, the fields that differ, and all metrics of any of them."""
    fields = differing(runs)
    rows = [
        ["", *(run.name for run in runs)],
        ["state", *(run.state for run in runs)],
        ["time", *(duration_text(run.seconds) for run in runs)],
        *([key, *map(short, values)] for key, values in fields.items()),
        *([key, *(metric_text(key, run.metrics.get(key)) for run in runs)] for key in metrics_of(runs)),
    ]
    note = [] if fields else ["their recipes differ in no field"]
    return [*aligned(rows), *note]


def curves(runs: Sequence[LoggedRun], histories: Histories, *, plain: bool) -> list[str]:
    """Return the curves of each metric, one below the other on the same axes."""
    width = max(len(run.name) for run in runs)
    lines = []
    for name, all_points in histories.items():
        drawn = [finite(points) for points in all_points]
        if not any(drawn):
            continue
        steps = [point.step for points in drawn for point in points]
        axes = (min(steps), max(steps)), limits([points for points in drawn if points])
        low, high = (metric_text(name, value) for value in axes[1])
        lines += ["", f"{name} from {low} to {high}, steps {axes[0][0]:,} to {axes[0][1]:,}"]
        lines += [
            f"  {run.name:<{width}}  {sparkline(points, *axes, plain=plain)}".rstrip()
            for run, points in zip(runs, drawn, strict=True)
        ]
    return lines


def comparison_json(runs: Sequence[LoggedRun]) -> dict[str, Any]:
    """Return what `side_by_side` shows, as JSON; differs: by field, the value of each run."""
    return {"differs": differing(runs), "runs": [run_json(run) for run in runs]}


def metrics_of(runs: Sequence[LoggedRun]) -> list[str]:
    """Return the metrics of any run, those of the model first."""
    known = {key for run in runs for key in run.metrics if not key.startswith("system/")}
    prefixes = ("eval/", "train/", "perf/")
    return sorted(known, key=lambda key: (not key.startswith(prefixes[0]), not key.startswith(prefixes), key))
