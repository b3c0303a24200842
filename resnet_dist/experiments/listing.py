"""Many runs as a table, the best first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resnet_dist.experiments.numbers import duration_text, metric_text, time_text
from resnet_dist.tracking.logged_run import LOSS, SPEED, TOP1, LoggedRun, best_first, differing

MAX_FIELDS = 6  # recipe fields that a table has columns for
MAX_VALUE = 24  # characters of a field's value


def table(runs: Sequence[LoggedRun]) -> list[str]:
    """Return the lines of a table: a row for each run, and a column for each recipe field in which they differ.

    A last line counts the fields that have no column.
    """
    ranked = best_first(runs)
    fields = differing(ranked)
    shown = list(fields)[:MAX_FIELDS]
    head = ["RUN", "STATE", "TOP-1", "LOSS", "IMAGES/S", "TIME", "STARTED", *map(short_name, shown)]
    rows = [_row(run, [fields[key][number] for key in shown]) for number, run in enumerate(ranked)]
    if any(run.group for run in ranked):
        head.append("PART OF")
        rows = [[*row, run.group or "-"] for row, run in zip(rows, ranked, strict=True)]
    left_out = len(fields) - len(shown)
    more = [f"{left_out} more fields differ; `resnet-dist runs compare` shows all"] if left_out else []
    return [*aligned([head, *rows]), *more]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines whose columns lie below one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def short_name(field: str) -> str:
    """Return the name of a field as the head of a column."""
    return field.rpartition(".")[2].upper()


def short(value: str | None) -> str:
    if value is None:
        return "-"
    return value if len(value) <= MAX_VALUE else f"{value[: MAX_VALUE - 1]}…"


def run_json(run: LoggedRun) -> dict[str, Any]:
    """Return a run as JSON: with all parameters, tags, and newest metrics."""
    return {
        "run": run.name,
        "id": run.run_id,
        "experiment": run.experiment,
        "state": run.state,
        "started": run.start_ms and run.start_ms / 1000,
        "ended": run.end_ms and run.end_ms / 1000,
        "seconds": run.seconds,
        "metrics": dict(run.metrics),
        "params": dict(run.params),
        "tags": _own(run.tags),
        "artifacts": run.artifacts,
    }


def _own(tags: Mapping[str, str]) -> dict[str, str]:
    """Return tags without those that hold models and views of MLflow's page."""
    return {key: value for key, value in tags.items() if not key.startswith("mlflow.log-model")}


def _row(run: LoggedRun, values: Sequence[str | None]) -> list[str]:
    metrics = [metric_text(key, run.metrics.get(key)) for key in (TOP1, LOSS, SPEED)]
    times = [duration_text(run.seconds), time_text(run.start_ms)]
    return [run.name, run.state, *metrics, *times, *map(short, values)]
