"""Turn a request into a finished run: choose the run, start its ranks, publish it, close it on every way out.

Everything that can be refused is refused before Ray starts or a file is written.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from types import ModuleType

from resnet_dist.driver.gauges import GAUGES, RunGauges, Sink, file_sink, metrics_file
from resnet_dist.driver.hold import choose, has_lost, locked, loss_reported
from resnet_dist.driver.output import check_output
from resnet_dist.driver.preflight import (
    check_continued,
    check_data,
    check_request,
    resolve_paths,
    with_workers,
)
from resnet_dist.driver.request import Interrupted, Reporter, Request, Summary
from resnet_dist.driver.restarts import Restart, Restarts, launch_with_restarts
from resnet_dist.errors import (
    AlreadyReported,
    Diverged,
    RankFailed,
    StorageError,
    Superseded,
    TrainingError,
    UserError,
)
from resnet_dist.launch.attempt import RankLauncher
from resnet_dist.launch.local import local_launcher
from resnet_dist.launch.torchrun import torchrun_launcher
from resnet_dist.runs.folder import FAILURES_FOLDER, RunFolder, Status, unsent_summary
from resnet_dist.runs.stalls import shown_stalls
from resnet_dist.runs.storage.open import resolved
from resnet_dist.system.command import resume_advice
from resnet_dist.system.redact import redact_all
from resnet_dist.system.signals import defer_signals, handle_signals, raise_interrupt, raise_on_second
from resnet_dist.system.streams import log_to
from resnet_dist.tracking.origin import origin_tags
from resnet_dist.tracking.protocol import OpenPublisher, Publisher, RunRecord
from resnet_dist.tracking.spool import Entry, has_steps, start_seconds
from resnet_dist.tracking.store import shown_tracker, store_folder, store_note
from resnet_dist.train.checkpoint.folder import best_or_newest, list_checkpoints
from resnet_dist.train.loop import Outcome

log = logging.getLogger(__name__)

LAST_UPLOAD_SECONDS = CLOSE_SECONDS = 30.0
# The ranks' grace time leaves little after an interruption. Unsent metrics stay in the spool; a resumed run
# sends them.
LAST_UPLOAD_FAILED_SECONDS = (
    5.0  # Something may be about to start the ranks again, and must not wait for a tracker.
)
LAST_UPLOAD_INTERRUPTED_SECONDS = CLOSE_INTERRUPTED_SECONDS = 3.0


@dataclass(frozen=True)
class _Ended:
    """The end of an attempt: the status that its MLflow run was closed with, and what the ranks returned."""

    run: RunFolder
    status: Status
    outcome: Outcome | None  # None where the ranks were interrupted before they could save


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
    gauge_file = metrics_file()
    with handle_signals(raise_interrupt), ExitStack() as stack:
        check_output(request.output)
        run = choose(request)
        is_new = not list_checkpoints(run.checkpoints)
        indexes, total_steps = check_data(request.recipe, reporter, is_new=is_new, output=request.output)
        # Lock before Ray is connected: the stack closes in reverse, so the ranks have gone before the lock has.
        run = stack.enter_context(locked(request, run, reporter.note))
        stack.enter_context(loss_reported(run))
        run = run.with_data([index.digest() for index in indexes])
        check_continued(run, request.recipe, indexes[0])
        launch = stack.enter_context(_launcher(request, reporter))
        sinks = [stack.enter_context(file_sink(gauge_file))] if gauge_file else []
        gauges = RunGauges(run, total_steps, [*sinks, *_ray_sinks(request)])
        try:
            ended = _train_published(request, run, launch, total_steps, gauges, reporter, open_publisher)
        except (AlreadyReported, Diverged):
            raise
        except Superseded as stale:
            raise RankFailed(f"{stale}\n{resume_advice(run.name)}") from None
        except TrainingError as failed:
            raise TrainingError(f"{failed}\nonce that is mended, {resume_advice(run.name)}") from None
        except RankFailed as failed:
            details = f"\ndetails are in {run.location}/{_newest_failure(run)}" if failed.details else ""
            raise RankFailed(f"{failed}{details}\n{resume_advice(run.name)}") from None
    if ended.outcome is None or ended.status == "KILLED":
        raise Interrupted(ended.run, ended.outcome.step if ended.outcome else None)
    names = list_checkpoints(ended.run.checkpoints)
    checkpoint = f"{ended.run.checkpoints.location}/{names[-1]}" if names else None
    return Summary(ended.run, ended.outcome, checkpoint, time.monotonic() - start)


def _train_published(
    request: Request,
    run: RunFolder,
    launch: RankLauncher,
    total_steps: int,
    gauges: RunGauges,
    reporter: Reporter,
    open_publisher: OpenPublisher,
) -> _Ended:
    """Open the MLflow run, run all ranks to their end, and close the MLflow run whatever happened in between.

    An interruption is returned as the status KILLED. Raises what ended the ranks, and UserError of the
    publisher.
    """
    publisher: Publisher | None = None
    status: Status = "FAILED"
    outcome = None
    seconds: dict[int, float] = {}  # by attempt: from the cause of its start to its first step

    def begin_again(next_attempt: RunFolder, restart: Restart) -> None:
        nonlocal run
        run = next_attempt  # also where this attempt fails
        gauges.restarted(run)
        _report_restart(reporter, run, restart)
        if publisher is not None:
            publisher.describe_attempt(run.with_seconds(seconds))

    def show(entry: Entry) -> None:
        if entry.start is not None:
            seconds.update(start_seconds([entry]))
            if publisher is not None:
                publisher.describe_attempt(run.with_seconds(seconds))
        gauges.show(entry)
        reporter.entry(entry)

    try:
        with defer_signals():  # An interrupt inside `_open` would leave an MLflow run that nobody closes.
            run, publisher = _open(request, run, reporter, open_publisher, show)
        log_to(run.log)
        publisher.start()
        reporter.note(f"run {run.name}: {total_steps} steps, {request.ranks} rank(s)")
        reporter.begin(total_steps)
        restarts = Restarts(request.max_restarts)
        with shown_stalls(run.storage, reporter.note), gauges.sent(publisher.num_waiting):
            run, outcome = launch_with_restarts(run, launch, restarts, begin_again, reporter.note)
        if outcome is not None and outcome.finished:
            check_results(run)
            status = "FINISHED"
        else:
            status = "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
    finally:
        if publisher is not None:
            status, unread = _close(publisher, run, status)
            unsent = (*publisher.unsent, *unread)
            run = run.with_seconds(seconds)
            run = _record_end(run.with_run_id(publisher.run_id).ended(status, unsent), reporter)
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


def _open(
    request: Request,
    run: RunFolder,
    reporter: Reporter,
    open_publisher: OpenPublisher,
    show: Callable[[Entry], None],
) -> tuple[RunFolder, Publisher]:
    """Write the run folder, then open the publisher: no MLflow run is left unknown where the driver dies.

    Raises UserError where the publisher cannot be used; a new run is then removed.
    """
    if run.tracker not in (None, shown_tracker()):
        reporter.note(
            f"run {run.name} goes to {shown_tracker() or 'the store in the output folder'} from here on"
        )
    tags = {**origin_tags(request.source, request.recipe.description), **request.tags}
    run = replace(run, tags=redact_all(tags), tracker=shown_tracker())
    run.write()
    if (note := store_note(request.output)) is not None:
        reporter.note(note)
    try:
        record = RunRecord(run, request.recipe, store_folder(request.output))
        publisher = open_publisher(record, show)
    except UserError:
        if run.attempt == 1:
            run.remove()
        raise
    run = run.with_run_id(publisher.run_id)
    run.write()
    return run, publisher


def _close(publisher: Publisher, run: RunFolder, status: Status) -> tuple[Status, list[str]]:
    """Send the last metrics, log the model of a finished run, and close the MLflow run.

    Return the status that it was closed with, and what was not sent because the run's storage could not be read. A run
    that was lost to another driver is left to that one.
    """
    unread: list[str] = []
    if has_lost(run):
        publisher.abandon()
        return status, unread
    try:
        if status == "KILLED":
            publisher.finish(LAST_UPLOAD_INTERRUPTED_SECONDS)
        else:
            publisher.finish(LAST_UPLOAD_SECONDS if status == "FINISHED" else LAST_UPLOAD_FAILED_SECONDS)
            # The best model is the one to load; there is one only where train.best_metric names a metric.
            checkpoint = None
            if status == "FINISHED":
                try:
                    checkpoint = best_or_newest(run.checkpoints)
                except StorageError as error:
                    log.warning("the model was not logged: %s", error)
                    unread.append("the model")
            publisher.log_results(checkpoint)
    except KeyboardInterrupt:
        if status == "FINISHED":
            status = "KILLED"  # Training is complete; resuming the run publishes the rest.
    finally:
        try:
            with handle_signals(raise_on_second):
                publisher.close(status, CLOSE_INTERRUPTED_SECONDS if status == "KILLED" else CLOSE_SECONDS)
        except KeyboardInterrupt:
            status = "KILLED"
    return status, unread


def _record_end(run: RunFolder, reporter: Reporter) -> RunFolder:
    """Write the end of an attempt to the run folder, where the next command looks for it."""
    try:
        if run.is_lost:  # Its record is the new driver's.
            return run
        if not run.storage.is_gone():  # A new folder would be in the way of the one that was moved.
            run.write()
    except OSError as error:  # A full disk must not hide what ended the training.
        reporter.note(f"{run.location}: the end of the run was not recorded ({error})")
    if run.unsent and run.status != "FINISHED":  # A finished run is summed up by the command.
        reporter.note(unsent_summary(run))
    return run


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


def _launcher(request: Request, reporter: Reporter) -> AbstractContextManager[RankLauncher]:
    """Return the launcher that the request asks for, with its resources.

    Raises UserError where they are missing.
    """
    if request.torchrun is not None:
        return nullcontext(torchrun_launcher(request.recipe, request.torchrun, gpu=request.gpu))
    if request.local:
        return nullcontext(local_launcher(request.recipe, gpu=request.gpu))
    return _import_ray_train().ray_launcher(  # type: ignore[no-any-return]
        request.recipe,
        workers=request.ranks,
        gpu=request.gpu,
        address=request.address,
        wait_seconds=request.wait_seconds,
        report=reporter.note,
    )


def _ray_sinks(request: Request) -> list[Sink]:
    """Return the sink for the gauges of a run on Ray, once its launcher has connected to the cluster."""
    if request.local or request.torchrun is not None:
        return []
    from resnet_dist.launch.ray_gauges import RayGauges

    return [RayGauges(GAUGES)]


def _import_ray_train() -> ModuleType:
    """Import Ray late: `--local` and torchrun work without it. Raises UserError where it is not installed."""
    try:
        with defer_signals():  # An exception in the middle of Ray's import would leave it broken.
            from resnet_dist.launch import ray_train
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise  # Ray is installed but broken.
        raise UserError(f"Ray is not installed ({error}); --local trains in this process") from None
    return ray_train
