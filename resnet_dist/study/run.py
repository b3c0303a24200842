"""Train the runs of a study one after another in this process, and tell what they say together.

A run that is finished is not repeated and one that was interrupted goes on, so the same command continues a
study. Every run is what `train` would make of its recipe.

output/studies/NAME/   study.json  figure.png  runs.csv        output/runs/NAME-TRIAL/…
"""

from __future__ import annotations

from resnet_dist.config import Recipe, Trial
from resnet_dist.driver.preflight import check_recipe
from resnet_dist.driver.request import Interrupted, Reporter
from resnet_dist.driver.run import run_training
from resnet_dist.errors import UserError
from resnet_dist.runs.choose import choose_run
from resnet_dist.runs.folder import RunFolder, Status, read_run
from resnet_dist.study.report import (
    StudySummary,
    report,
)
from resnet_dist.study.request import StudyRequest
from resnet_dist.system.signals import defer_signals, handle_signals, raise_interrupt
from resnet_dist.tracking.protocol import OpenPublisher, OpenStudy, StudyPublisher, StudyRecord


class StudyInterrupted(Exception):
    """A person or the cluster stopped the study after `finished` runs; the same command continues it."""

    def __init__(self, finished: int) -> None:
        super().__init__(f"the study was interrupted after {finished} finished runs")
        self.finished = finished


def run_study(
    request: StudyRequest, reporter: Reporter, open_study: OpenStudy, open_publisher: OpenPublisher
) -> StudySummary:
    """Train what is not finished yet of `request.study`, then draw its figure and write its table.

    Raises UserError before anything is started, StudyInterrupted after SIGINT or SIGTERM, and what
    `run_training` raises where a run fails. What is finished by then is drawn on every way out.
    """
    refuse_mistakes(request)
    finished: list[RunFolder] = []
    publisher: StudyPublisher | None = None
    status: Status = "FAILED"
    summary = None
    try:
        with defer_signals():  # a run that was begun in MLflow must be closed
            publisher = open_study(
                StudyRecord(request.study, request.full_name, request.folder, request.source, request.output)
            )
        with handle_signals(raise_interrupt):
            for number, trial in enumerate(request.study.trials, start=1):
                reporter.note(f"trial {number} of {len(request.study.trials)}: {trial.name}")
                finished.append(_train(request, trial, reporter, publisher, open_publisher))
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise StudyInterrupted(len(finished)) from None
    finally:
        if publisher is not None:
            try:
                if finished:
                    summary = report(request, finished)
                    publisher.log_files(summary.figure, summary.table)
            except KeyboardInterrupt:
                status = "KILLED"
                raise StudyInterrupted(len(finished)) from None
            except BaseException:
                status = "FAILED"
                raise
            finally:
                publisher.close(status, summary.conclusion if summary else "")
    assert summary is not None  # a study has at least one trial
    return summary


def refuse_mistakes(request: StudyRequest) -> None:
    """What can be refused of any trial, before the first is trained. Raises UserError."""
    for trial in request.study.trials:
        asked = request.of_trial(trial, {})
        try:
            check_recipe(asked.recipe, asked.world_size)
            choose_run(asked.output, asked.recipe, asked.name, resume=False)
        except UserError as error:
            raise UserError(f"trial {trial.name}: {error}") from None


def _train(
    request: StudyRequest,
    trial: Trial,
    reporter: Reporter,
    publisher: StudyPublisher,
    open_publisher: OpenPublisher,
) -> RunFolder:
    asked = request.of_trial(trial, publisher.member_tags())
    assert asked.name is not None
    known = read_run(asked.output / "runs" / asked.name)
    if known is not None and _is_finished(known, asked.recipe, publisher):
        reporter.note(f"run {known.name}: finished before")
        return known
    return run_training(asked, reporter, open_publisher).run


def _is_finished(run: RunFolder, recipe: Recipe, publisher: StudyPublisher) -> bool:
    """Whether `recipe`, which `choose_run` has let through, leaves the run nothing to do."""
    same_length = Recipe.model_validate(run.recipe).train.length == recipe.train.length
    return same_length and run.run_id is not None and publisher.is_finished(run.run_id)
