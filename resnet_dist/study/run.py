"""Train the runs of a study one after another, all on one Ray where they use it, and report their common result.

Finished runs are not repeated and interrupted ones are resumed, so the same command resumes a study. Every
run is the run that `train` would make of its recipe.

output/studies/NAME/   study.json  figure.png  runs.csv        output/runs/NAME-TRIAL/…
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from resnet_dist.config import Recipe, Trial
from resnet_dist.driver.launcher import shared_ray
from resnet_dist.driver.output import check_output
from resnet_dist.driver.request import Interrupted, Reporter
from resnet_dist.driver.run import run_training
from resnet_dist.driver.trial import check_trial
from resnet_dist.errors import INTERRUPTED_EXIT_CODE
from resnet_dist.runs.folder import RUNS_FOLDER, RunFolder, Status, read_run
from resnet_dist.runs.group_folder import held, unsent_line
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.study.report import StudySummary, report
from resnet_dist.study.request import StudyRequest
from resnet_dist.system.signals import defer_signals, handle_signals, raise_interrupt
from resnet_dist.tracking.protocol import GroupPublisher, GroupRecord, OpenGroup, OpenPublisher


class StudyInterrupted(Exception):
    """A person or the cluster stopped the study after `finished` runs; the same command resumes it."""

    exit_code = INTERRUPTED_EXIT_CODE

    def __init__(self, finished: int) -> None:
        super().__init__(f"the study was interrupted after {finished} finished runs")
        self.finished = finished


def run_study(
    request: StudyRequest, reporter: Reporter, open_group: OpenGroup, open_publisher: OpenPublisher
) -> StudySummary:
    """Train the runs of `request.study` that are not finished yet, then draw its figure and write its table.

    Raises UserError before anything is started, StudyInterrupted after SIGINT or SIGTERM, and what
    `run_training` raises where a run fails. The runs finished by then are drawn on every way out.
    """
    check_trials(request)
    check_output(request.output)
    with held(request.folder):
        return _run_held(request, reporter, open_group, open_publisher)


def _run_held(
    request: StudyRequest, reporter: Reporter, open_group: OpenGroup, open_publisher: OpenPublisher
) -> StudySummary:
    finished: list[RunFolder] = []
    publisher: GroupPublisher | None = None
    status: Status = "FAILED"
    summary: StudySummary | None = None
    try:
        record = GroupRecord(request.study, request.full_name, request.folder, request.source, request.output)
        # An interrupt inside `open_group` would leave an MLflow run that nobody closes.
        with defer_signals():
            publisher = open_group(record)
        with handle_signals(raise_interrupt), ExitStack() as ray:
            for number, trial in enumerate(request.study.trials, start=1):
                reporter.note(f"trial {number} of {len(request.study.trials)}: {trial.name}")
                finished.append(_train(request, trial, reporter, publisher, open_publisher, ray))
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise StudyInterrupted(len(finished)) from None
    finally:
        if publisher is not None:
            summary = _report_and_close(request, finished, publisher, status)
            if publisher.unsent and status != "FINISHED":  # A finished study is summed up by the command.
                reporter.note(f"study {request.full_name}: {unsent_line(request.folder, publisher.unsent)}")
    assert summary is not None  # A study has at least one trial.
    return summary


def _report_and_close(
    request: StudyRequest, finished: list[RunFolder], publisher: GroupPublisher, status: Status
) -> StudySummary | None:
    """Report on the finished runs, if any, and close the study's MLflow run whatever happens.

    Raises StudyInterrupted after SIGINT or SIGTERM, and what `report` raises.
    """
    summary = None
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
    return None if summary is None else replace(summary, unsent=publisher.unsent)


def check_trials(request: StudyRequest) -> None:
    """Check every trial before the first is trained. Raises UserError with the name of the trial."""
    for trial in request.study.trials:
        check_trial(request.of_trial(trial, {}), f"trial {trial.name}")


def _train(
    request: StudyRequest,
    trial: Trial,
    reporter: Reporter,
    publisher: GroupPublisher,
    open_publisher: OpenPublisher,
    ray: ExitStack,
) -> RunFolder:
    """Train the run of `trial` to its end, unless it is finished already. ray: keeps the Ray of all trials."""
    of_trial = request.of_trial(trial, publisher.member_tags())
    assert of_trial.name is not None
    known = read_run(open_storage(of_trial.output).at(RUNS_FOLDER).at(of_trial.name))
    if known is not None and _is_finished(known, of_trial.recipe, publisher):
        reporter.note(f"run {known.name}: finished before")
        return known
    ray.enter_context(shared_ray(of_trial, reporter))
    return run_training(of_trial, reporter, open_publisher).run


def _is_finished(run: RunFolder, recipe: Recipe, publisher: GroupPublisher) -> bool:
    """Report whether the run is finished and `recipe`, which `choose_run` has accepted, has its length."""
    same_length = Recipe.model_validate(run.recipe).train.length == recipe.train.length
    if run.status is not None or not same_length:
        return same_length and run.status == "FINISHED"
    # An earlier version did not record the status in the run folder.
    return run.run_id is not None and publisher.is_finished(run.run_id)
