"""Reduce the metrics of a study's runs to results, and write the figure, the table and the conclusion."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from resnet_dist.config import Result, Study, Trial
from resnet_dist.errors import UserError
from resnet_dist.runs.evaluation_results import failed_evaluations
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.group_folder import FIGURE_FILE, TABLE_FILE
from resnet_dist.study.figure import Curve, draw_study
from resnet_dist.study.request import StudyRequest
from resnet_dist.tracking.spool import Entry, Follower, read_layers
from resnet_dist.train.step.gradient_norms import GRADIENT_NORMS

EVALUATION = "eval/"  # the prefix of the metrics of an evaluation
TRAINING_METRICS = ("train/loss", "train/top1")


@dataclass(frozen=True)
class StudySummary:
    """The results of a study, and the files that show them."""

    results: tuple[Result, ...]  # in the order of the trials
    conclusion: str
    figure: Path
    table: Path
    # Not compared: a run that was finished before is read from its file.
    runs: tuple[RunFolder, ...] = field(default=(), compare=False)
    # What MLflow did not get besides them, in words.
    unsent: tuple[str, ...] = field(default=(), compare=False)
    # Steps that were to be evaluated, each with its run and the reason.
    not_evaluated: tuple[str, ...] = ()


def report(request: StudyRequest, runs: Sequence[RunFolder]) -> StudySummary:
    """Write figure and table of `runs`, which belong to the first trials of the study.

    Raises UserError where a run has lost its metrics.
    """
    study = request.study
    trials = study.trials[: len(runs)]
    logged = [read_metrics(run) for run in runs]
    failed = [failed_evaluations(run.storage) for run in runs]
    results = tuple(
        Result(trial.tags, summarise(of_run, study.last_steps, [one.step for one in of_failed]))
        for trial, of_run, of_failed in zip(trials, logged, failed, strict=True)
    )
    complete = len(runs) == len(study.trials)
    conclusion = (
        study.conclude(results)
        if complete
        else f"{request.full_name}: {len(runs)} of {len(study.trials)} runs"
    )
    curves = [
        curve_of(study, trial, of_run, read_layers(run.spool, GRADIENT_NORMS))
        for trial, of_run, run in zip(trials, logged, runs, strict=True)
    ]
    figure, table = request.folder / FIGURE_FILE, request.folder / TABLE_FILE
    draw_study(curves, title=conclusion).savefig(figure)
    write_table(table, runs, results)
    lost = tuple(f"{run.name} {one}" for run, of_run in zip(runs, failed, strict=True) for one in of_run)
    return StudySummary(results, conclusion, figure, table, tuple(runs), not_evaluated=lost)


def read_metrics(run: RunFolder) -> dict[int, dict[str, float]]:
    """Return the metrics that a run has logged, by step.

    Raises UserError where its spool holds no training loss.
    """
    metrics = metrics_by_step(Follower(run.spool).read())
    if not any("train/loss" in of_step for of_step in metrics.values()):
        raise UserError(
            f"{run.spool}: holds no training loss, so the run cannot be compared; remove {run.location}, or give "
            "the study a new --name"
        )
    return metrics


def metrics_by_step(entries: Sequence[Entry]) -> dict[int, dict[str, float]]:
    """Return the metrics of every logged step, in order.

    A step that a restart repeated has its last values.
    """
    steps: dict[int, dict[str, float]] = {}
    for entry in entries:
        if entry.step is not None:
            steps[entry.step] = {**steps.get(entry.step, {}), **entry.metrics}
    return dict(sorted(steps.items()))


def summarise(
    metrics: Mapping[int, Mapping[str, float]], last_steps: int, failed: Sequence[int] = ()
) -> dict[str, float]:
    """Return the newest value of each metric; for TRAINING_METRICS, the mean of the last `last_steps` steps.

    failed: steps whose evaluation has failed. An evaluation before one of them is not the result.
    """
    newest = {
        name: value
        for step, of_step in metrics.items()
        for name, value in of_step.items()
        if not name.startswith(EVALUATION) or step >= max(failed, default=0)
    }
    begin = max(metrics) - last_steps
    for name in TRAINING_METRICS:
        newest[name] = fmean(
            values[name] for step, values in metrics.items() if step > begin and name in values
        )
    return newest


def curve_of(
    study: Study,
    trial: Trial,
    metrics: Mapping[int, Mapping[str, float]],
    norms: Mapping[int, Mapping[str, float]],
) -> Curve:
    """Return the curve of one run. norms: the L2 norm of the gradient, by step, then by layer."""
    losses = {step: values["train/loss"] for step, values in metrics.items() if "train/loss" in values}
    return Curve(
        family=trial.tags[study.family],
        shade=trial.tags[study.shade],
        steps=tuple(losses),
        losses=tuple(losses.values()),
        gradient_norms={step: tuple(by_layer.values()) for step, by_layer in sorted(norms.items())},
    )


def error_text(top1: float | None) -> str:
    return "-" if top1 is None else f"{1 - top1:.6g}"


def write_table(path: Path, runs: Sequence[RunFolder], results: Sequence[Result]) -> None:
    """Write a CSV file with a line for each run: its name, its tags, its results and its id in MLflow."""
    rows = [
        {
            "run": run.name,
            **result.tags,
            "train_loss": f"{result.metrics['train/loss']:.6g}",
            "train_error": f"{1 - result.metrics['train/top1']:.6g}",
            "eval_error": error_text(result.metrics.get("eval/top1")),
            "mlflow_run_id": run.run_id,
        }
        for run, result in zip(runs, results, strict=True)
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
