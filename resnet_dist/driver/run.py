"""Turn a request into a finished run: choose the run, start its ranks, publish it, close it on every way out.

Everything that can be refused is refused before Ray starts or a file is written.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

from resnet_dist.data.shards.index import Index
from resnet_dist.driver.fork import begin_fork, check_fork, find_origin
from resnet_dist.driver.gauges import RunGauges, file_sinks, metrics_file
from resnet_dist.driver.hold import choose, locked, loss_reported
from resnet_dist.driver.launcher import launcher_of, ray_sinks
from resnet_dist.driver.output import check_output
from resnet_dist.driver.page import record_failure, record_stop
from resnet_dist.driver.preflight import (
    check_continued,
    check_data,
    check_request,
    resolve_paths,
    with_workers,
)
from resnet_dist.driver.publish import Starts, close_run, open_run, record_end
from resnet_dist.driver.request import Interrupted, Reporter, Request, Summary
from resnet_dist.driver.restarts import Restart, Restarts, launch_with_restarts, patiently
from resnet_dist.errors import (
    AlreadyReported,
    Diverged,
    RankFailed,
    Superseded,
    TrainingError,
)
from resnet_dist.launch.attempt import RankLauncher
from resnet_dist.runs.evaluation_results import failed_evaluations
from resnet_dist.runs.folder import FAILURES_FOLDER, RunFolder, Status
from resnet_dist.runs.stalls import shown_stalls
from resnet_dist.runs.storage.open import resolved
from resnet_dist.runs.storage.protocol import Unreachable
from resnet_dist.system.command import resume_advice
from resnet_dist.system.signals import defer_signals, handle_signals, raise_interrupt
from resnet_dist.system.streams import log_to
from resnet_dist.tracking.protocol import OpenPublisher, Publisher
from resnet_dist.tracking.spool import Entry, has_steps
from resnet_dist.train.checkpoint.folder import list_checkpoints, remove_uncommitted, step_of
from resnet_dist.train.loop import Outcome

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ended:
    """The end of an attempt: the status that its MLflow run was closed with, and what the ranks returned."""

    run: RunFolder
    status: Status
    outcome: Outcome | None  # None where the ranks were interrupted before they could save


@dataclass(frozen=True)
class _Prepared:
    """A run that is locked and checked, with all that its ranks need to start."""

    request: Request
    run: RunFolder
    indexes: Sequence[Index]
    total_steps: int
    launch: RankLauncher
    gauges: RunGauges


def run_training(request: Request, reporter: Reporter, open_publisher: OpenPublisher) -> Summary:
    """Train `request.recipe` to its end.

    Raises UserError before anything is started; Interrupted after SIGINT or SIGTERM (KeyboardInterrupt before
    the run exists); TrainingError or RankFailed where the training failed; Superseded where another driver has taken
    the run over. The MLflow run is closed on every other way out.
    """
    start = time.monotonic()
    request = replace(request, output=resolved(request.output))
    request = with_workers(replace(request, recipe=resolve_paths(request.recipe, request.output)))
    check_request(request)
    with handle_signals(raise_interrupt), ExitStack() as stack:
        prepared = _prepare(request, stack, reporter)
        with _advised(prepared.run):
            ended = _train_published(prepared, reporter, open_publisher)
    if ended.outcome is None or ended.status == "KILLED":
        raise Interrupted(ended.run, ended.outcome.step if ended.outcome else None)
    # The training is over: a storage that is away now must not make a failure of it.
    names = patiently(partial(list_checkpoints, ended.run.checkpoints), reporter.note)
    checkpoint = f"{ended.run.checkpoints.location}/{names[-1]}" if names else None
    failed = patiently(partial(failed_evaluations, ended.run.storage), reporter.note)
    reasons = tuple(map(str, failed))
    return Summary(ended.run, ended.outcome, checkpoint, time.monotonic() - start, reasons)


def _prepare(request: Request, stack: ExitStack, reporter: Reporter) -> _Prepared:
    """Choose, check and lock the run, and connect to what starts its ranks. stack: releases all that at the end.

    Raises UserError before a file is written.
    """
    gauge_file = metrics_file()
    check_output(request.output)
    run = choose(request)
    origin = find_origin(request, run)
    is_new = origin is None and not list_checkpoints(run.checkpoints)
    indexes, total_steps = check_data(request.recipe, reporter, is_new=is_new, output=request.output)
    # Lock before Ray is connected: the stack closes in reverse, so the ranks have gone before the lock has.
    run = stack.enter_context(locked(request, run, reporter.note))
    stack.enter_context(loss_reported(run))
    run = run.with_data([index.digest() for index in indexes])
    check_continued(run, request.recipe, indexes[0])
    if origin is not None:
        check_fork(origin, request.recipe, indexes, total_steps)
        run = begin_fork(origin, run, request.recipe, reporter.note)
    run = _with_profile(run, request, total_steps)
    launch = stack.enter_context(launcher_of(request, reporter))
    sinks = stack.enter_context(file_sinks(gauge_file, reporter.note))
    gauges = RunGauges(run, total_steps, [*sinks, *ray_sinks(request)])
    return _Prepared(request, run, indexes, total_steps, launch, gauges)


def _with_profile(run: RunFolder, request: Request, total_steps: int) -> RunFolder:
    """Return the run with the steps to profile. Raises UserError where it takes no such steps any more."""
    if request.profile is not None:
        names = list_checkpoints(run.checkpoints)
        request.profile.check(total_steps, step_of(names[-1]) if names else 0, run.name)
    return replace(run, profile=request.profile)


@contextmanager
def _advised(run: RunFolder) -> Iterator[None]:
    """Name, with what ended the ranks, the command that continues the run, and the file that has all of it."""
    try:
        yield
    except (AlreadyReported, Diverged):
        raise
    except (Superseded, Unreachable) as stale:
        raise RankFailed(f"{stale}\n{resume_advice(run.name)}") from None
    except TrainingError as failed:
        raise TrainingError(f"{failed}\nonce that is mended, {resume_advice(run.name)}") from None
    except RankFailed as failed:
        details = f"\ndetails are in {run.location}/{_newest_failure(run)}" if failed.details else ""
        raise RankFailed(f"{failed}{details}\n{resume_advice(run.name)}") from None


def _train_published(prepared: _Prepared, reporter: Reporter, open_publisher: OpenPublisher) -> _Ended:
    """Open the MLflow run, run all ranks to their end, and close the MLflow run whatever happened in between.

    An interruption is returned as the status KILLED. Raises what ended the ranks, and UserError of the
    publisher.
    """
    request, run, gauges = prepared.request, prepared.run, prepared.gauges
    publisher: Publisher | None = None
    status: Status = "FAILED"
    outcome = None
    starts = Starts()

    def begin_again(next_attempt: RunFolder, restart: Restart) -> None:
        nonlocal run
        run = next_attempt  # also where this attempt fails
        gauges.restarted(run)
        _report_restart(reporter, run, restart)
        if publisher is not None:
            publisher.describe_attempt(starts.shown_in(run))

    def show(entry: Entry) -> None:
        if starts.add(entry) and publisher is not None:
            publisher.describe_attempt(starts.shown_in(run))
        gauges.show(entry)
        reporter.entry(entry)

    try:
        with defer_signals():  # An interrupt inside `open_run` would leave an MLflow run that nobody closes.
            run, publisher = open_run(request, run, prepared.indexes, reporter, open_publisher, show)
        log_to(run.log)
        publisher.start()
        reporter.note(f"run {run.name}: {prepared.total_steps} steps, {request.ranks} rank(s)")
        reporter.begin(prepared.total_steps)
        restarts = Restarts(request.max_restarts)
        with shown_stalls(run.storage, reporter.note), gauges.sent(publisher.num_waiting):
            run, outcome = launch_with_restarts(run, prepared.launch, restarts, begin_again, reporter.note)
        status = "KILLED"
        if outcome is not None and outcome.finished:
            patiently(partial(check_results, run), reporter.note)
            status = "FINISHED"
            remove_parts(run, reporter.note)
        else:
            run = record_stop(run)
            publisher.describe_attempt(starts.shown_in(run))
    except KeyboardInterrupt:
        status = "KILLED"
    except BaseException as error:
        status = "FAILED"
        if publisher is not None and not run.is_lost:
            with suppress(KeyboardInterrupt):  # An impatient Ctrl-C must not hide what ended the run.
                run = record_failure(run, error)
                publisher.describe_attempt(starts.shown_in(run))
        raise
    finally:
        if publisher is not None:
            status, unread = close_run(publisher, run, status)
            ended = starts.shown_in(run).ended(status, (*publisher.unsent, *unread))
            run = record_end(ended.with_run_id(publisher.run_id), reporter)
            status = run.status or status
    return _Ended(run, status, outcome)


def _newest_failure(run: RunFolder) -> str:
    """Return the name of the file with everything that is known of the newest failure."""
    with suppress(OSError):
        names = [found.name for found in run.storage.objects(FAILURES_FOLDER)]
        return max(names, default=FAILURES_FOLDER)
    return FAILURES_FOLDER


def _report_restart(reporter: Reporter, run: RunFolder, restart: Restart) -> None:
    where = f"step {restart.step}" if restart.step else "the beginning"
    reporter.note(f"{restart.cause}; attempt {run.attempt} resumes from {where}")


def remove_parts(run: RunFolder, report: Callable[[str], None]) -> None:
    """Remove what has no checkpoint.json among the checkpoints of finished ranks: no later start may come to do it."""
    try:
        run.check_lease()
        remove_uncommitted(run.checkpoints)
    except OSError as error:  # The results are whole.
        report(f"{run.checkpoints.location}: parts of an unfinished checkpoint may stay ({error})")


def check_results(run: RunFolder) -> None:
    """Raise TrainingError where the storage, as the driver sees it, lacks what finished ranks have written."""
    missing = [] if list_checkpoints(run.checkpoints) else ["checkpoint"]
    if not has_steps(run.spool):
        missing.append("metrics")
    if missing:
        raise TrainingError(
            f"the ranks have reached the end, but {run.location} has no {' and no '.join(missing)} on {platform.node()}; "
            "--output must be a folder that all nodes share, or a URL such as s3://BUCKET/PREFIX"
        )
