"""Train the runs of a study one after another in this process, and tell what they say together.

A run that is finished is not repeated and one that was interrupted goes on, so the same command continues a
study. Every run is what `train` would make of its recipe.

output/studies/NAME/   study.json  figure.png  runs.csv        output/runs/NAME-TRIAL/…
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Protocol

from resnet_dist.config import Recipe, Result, Study, Trial, UserError
from resnet_dist.driver import (
    Interrupted,
    OpenTracking,
    Reporter,
    Request,
    check_recipe,
    resolve_paths,
    run_training,
)
from resnet_dist.interrupts import interrupt, signals_call, signals_held
from resnet_dist.runs import RunFolder, Status, choose_run, read_run
from resnet_dist.tracking.figures import Curve, draw_study
from resnet_dist.tracking.spool import Entry, Follower, read_layers
from resnet_dist.train.gradients import GRADIENT_NORMS

FIGURE_FILE, TABLE_FILE = "figure.png", "runs.csv"
TRAINING_METRICS = ("train/loss", "train/top1")


@dataclass(frozen=True)
class StudyRequest:
    """What a person asked for."""

    study: Study
    source: str  # the job file
    output: Path
    workers: int | None = None  # None: one rank in this process
    gpu: bool | None = None
    address: str | None = None
    name: str | None = None

    @property
    def full_name(self) -> str:
        return self.name or self.study.name

    @property
    def folder(self) -> Path:
        return self.output / "studies" / self.full_name

    def of_trial(self, trial: Trial) -> Request:
        """The request to train one run of the study."""
        recipe = trial.recipe.model_copy(update={"experiment": self.study.experiment})
        return Request(
            resolve_paths(recipe, self.output),
            self.source,
            self.output,
            workers=self.workers or 1,
            gpu=self.gpu,
            local=self.workers is None and self.address is None,
            address=self.address,
            name=f"{self.full_name}-{trial.name}",
        )


@dataclass(frozen=True)
class StudySummary:
    results: tuple[Result, ...]
    conclusion: str
    figure: Path
    table: Path


class StudyInterrupted(Exception):
    """A person or the cluster stopped the study after `finished` runs; the same command continues it."""

    def __init__(self, finished: int) -> None:
        super().__init__(f"the study was interrupted after {finished} finished runs")
        self.finished = finished


class StudyTracking(Protocol):
    """The driver's side of a group of runs in an experiment tracker."""

    def member_tags(self) -> dict[str, str]: ...

    def is_finished(self, run_id: str) -> bool: ...

    def log_files(self, *files: Path) -> None: ...

    def close(self, status: Status, conclusion: str) -> None: ...


OpenStudy = Callable[[StudyRequest], StudyTracking]
OpenMember = Callable[[Mapping[str, str]], OpenTracking]  # from the tags of a run


def run_study(
    request: StudyRequest, reporter: Reporter, open_study: OpenStudy, open_member: OpenMember
) -> StudySummary:
    """Train what is not finished yet of `request.study`, then draw its figure and write its table.

    Raises UserError before anything is started, StudyInterrupted after SIGINT or SIGTERM, and what
    `run_training` raises where a run fails. What is finished by then is drawn on every way out.
    """
    refuse_mistakes(request)
    finished: list[RunFolder] = []
    tracking: StudyTracking | None = None
    status: Status = "FAILED"
    summary = None
    try:
        with signals_held():  # a run that was begun in MLflow must be closed
            tracking = open_study(request)
        with signals_call(interrupt):
            for number, trial in enumerate(request.study.trials, start=1):
                reporter.say(f"trial {number} of {len(request.study.trials)}: {trial.name}")
                finished.append(_train(request, trial, reporter, tracking, open_member))
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise StudyInterrupted(len(finished)) from None
    finally:
        if tracking is not None:
            try:
                if finished:
                    summary = report(request, finished)
                    tracking.log_files(summary.figure, summary.table)
            except KeyboardInterrupt:
                status = "KILLED"
                raise StudyInterrupted(len(finished)) from None
            except BaseException:
                status = "FAILED"
                raise
            finally:
                tracking.close(status, summary.conclusion if summary else "")
    assert summary is not None  # a study has at least one trial
    return summary


def refuse_mistakes(request: StudyRequest) -> None:
    """What can be refused of any trial, before the first is trained. Raises UserError."""
    for trial in request.study.trials:
        asked = request.of_trial(trial)
        try:
            check_recipe(asked.recipe, asked.world_size)
            choose_run(asked.output, asked.recipe, asked.name, resume=False)
        except UserError as error:
            raise UserError(f"trial {trial.name}: {error}") from None


def _train(
    request: StudyRequest,
    trial: Trial,
    reporter: Reporter,
    tracking: StudyTracking,
    open_member: OpenMember,
) -> RunFolder:
    asked = request.of_trial(trial)
    assert asked.name is not None
    known = read_run(asked.output / "runs" / asked.name)
    if known is not None and _is_finished(known, asked.recipe, tracking):
        reporter.say(f"run {known.name}: finished before")
        return known
    return run_training(asked, reporter, open_member({**trial.tags, **tracking.member_tags()})).run


def _is_finished(run: RunFolder, recipe: Recipe, tracking: StudyTracking) -> bool:
    """Whether `recipe`, which `choose_run` has let through, leaves the run nothing to do."""
    same_length = Recipe.model_validate(run.recipe).train.length == recipe.train.length
    return same_length and run.run_id is not None and tracking.is_finished(run.run_id)


def report(request: StudyRequest, runs: Sequence[RunFolder]) -> StudySummary:
    """Write figure and table of the first trials, whose runs these are."""
    study = request.study
    trials = study.trials[: len(runs)]
    logged = [read_metrics(run) for run in runs]
    results = tuple(
        Result(trial.tags, summarise(of_run, study.last_steps))
        for trial, of_run in zip(trials, logged, strict=True)
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
    return StudySummary(results, conclusion, figure, table)


def read_metrics(run: RunFolder) -> dict[int, dict[str, float]]:
    """What a run has logged, by step. Raises UserError where that is gone."""
    metrics = metrics_by_step(Follower(run.spool).read())
    if not any("train/loss" in of_step for of_step in metrics.values()):
        raise UserError(
            f"{run.spool}: holds no training loss, so the run cannot be compared; remove {run.path}, or give "
            "the study a new --name"
        )
    return metrics


def metrics_by_step(entries: Sequence[Entry]) -> dict[int, dict[str, float]]:
    """Metrics of every logged step. Steps that a restart ran again are there once."""
    steps: dict[int, dict[str, float]] = {}
    for entry in entries:
        if entry.step is not None:
            steps[entry.step] = {**steps.get(entry.step, {}), **entry.metrics}
    return dict(sorted(steps.items()))


def summarise(metrics: Mapping[int, Mapping[str, float]], last_steps: int) -> dict[str, float]:
    """The newest value of every metric; of training, the mean over log lines of the last `last_steps` steps."""
    newest = {name: value for of_step in metrics.values() for name, value in of_step.items()}
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
    """What the figure shows of one run."""
    losses = {step: values["train/loss"] for step, values in metrics.items() if "train/loss" in values}
    return Curve(
        family=trial.tags[study.family],
        shade=trial.tags[study.shade],
        steps=tuple(losses),
        losses=tuple(losses.values()),
        gradient_norms={step: tuple(by_layer.values()) for step, by_layer in sorted(norms.items())},
    )


def write_table(path: Path, runs: Sequence[RunFolder], results: Sequence[Result]) -> None:
    """One line a run: its tags, its results, and where it is."""
    rows = [
        {
            "run": run.name,
            **result.tags,
            "train_loss": f"{result.metrics['train/loss']:.6g}",
            "train_error": f"{1 - result.metrics['train/top1']:.6g}",
            "eval_error": f"{1 - result.metrics['eval/top1']:.6g}",
            "mlflow_run_id": run.run_id,
        }
        for run, result in zip(runs, results, strict=True)
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
