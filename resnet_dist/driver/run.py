"""Turn a request into a finished run: choose the run, start its ranks, publish it, close it on every way out.

Everything that can be refused is refused before Ray starts or a file is written.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

from resnet_dist.driver.preflight import check_data, check_request, resolve_paths, with_workers
from resnet_dist.driver.request import Interrupted, Reporter, Request, Summary
from resnet_dist.driver.restarts import Restart, Restarts, launch_with_restarts
from resnet_dist.errors import AlreadyReported, RankFailed, TrainingError, UserError
from resnet_dist.launch.attempt import RankLauncher
from resnet_dist.launch.local import local_launcher
from resnet_dist.launch.torchrun import torchrun_launcher
from resnet_dist.runs.choose import choose_run, run_of_launch
from resnet_dist.runs.folder import FAILURES_FOLDER, RunFolder, Status
from resnet_dist.runs.storage.lease import Holder, log_loss
from resnet_dist.runs.storage.open import open_storage, resolved
from resnet_dist.system.command import resume_advice
from resnet_dist.system.signals import defer_signals, handle_signals, raise_interrupt, raise_on_second
from resnet_dist.tracking.protocol import OpenPublisher, Publisher, RunRecord
from resnet_dist.tracking.spool import has_steps
from resnet_dist.tracking.store import store_folder, store_note
from resnet_dist.train.checkpoint.folder import MANIFEST, MODEL_FILE, best_checkpoint, list_checkpoints
from resnet_dist.train.loop import Outcome

log = logging.getLogger(__name__)

LAST_UPLOAD_SECONDS = CLOSE_SECONDS = 30.0
# The ranks' grace time leaves little after an interruption. Unsent metrics stay in the spool; a resumed run
# sends them.
LAST_UPLOAD_INTERRUPTED_SECONDS = CLOSE_INTERRUPTED_SECONDS = 3.0


@dataclass(frozen=True)
class _Ended:
    """The end of an attempt: the status that its MLflow run was closed with, and what the ranks returned."""

    run: RunFolder
    status: Status
    outcome: Outcome | None  # None where the ranks were interrupted before they could save
    unsent_metrics: int


def run_training(request: Request, reporter: Reporter, open_publisher: OpenPublisher) -> Summary:
    """Train `request.recipe` to its end.

    Raises UserError before anything is started; Interrupted after SIGINT or SIGTERM (KeyboardInterrupt before
    the run exists); TrainingError or RankFailed where the training failed. The MLflow run is closed on every
    way out.
    """
    start = time.monotonic()
    request = replace(request, output=resolved(request.output))
    request = with_workers(replace(request, recipe=resolve_paths(request.recipe, request.output)))
    check_request(request)
    with handle_signals(raise_interrupt), ExitStack() as stack:
        open_storage(request.output).check()
        run = _choose_run(request)
        is_new = not list_checkpoints(run.checkpoints)
        indexes, total_steps = check_data(request.recipe, reporter, is_new=is_new, output=request.output)
        # Lock before Ray is connected: the stack closes in reverse, so the ranks have gone before the lock has.
        run = stack.enter_context(locked(request, run, reporter.note))
        run = run.with_data([index.digest() for index in indexes])
        launch = stack.enter_context(_launcher(request, reporter))
        try:
            ended = _train_published(request, run, launch, total_steps, reporter, open_publisher)
        except AlreadyReported:
            raise
        except RankFailed as failed:
            details = f"\ndetails are in {run.location}/{FAILURES_FOLDER}" if failed.details else ""
            raise RankFailed(f"{failed}{details}\n{resume_advice(run.name)}") from None
    if ended.outcome is None or ended.status == "KILLED":
        raise Interrupted(ended.run, ended.outcome.step if ended.outcome else None)
    newest = _newest(ended.run)
    checkpoint = newest and f"{ended.run.checkpoints.location}/{newest}"
    return Summary(ended.run, ended.outcome, checkpoint, time.monotonic() - start, ended.unsent_metrics)


def _train_published(
    request: Request,
    run: RunFolder,
    launch: RankLauncher,
    total_steps: int,
    reporter: Reporter,
    open_publisher: OpenPublisher,
) -> _Ended:
    """Open the MLflow run, run all ranks to their end, and close the MLflow run whatever happened in between.

    An interruption is returned as the status KILLED. Raises what ended the ranks, and UserError of the
    publisher.
    """
    publisher: Publisher | None = None
    status: Status = "FAILED"
    outcome, unsent_metrics = None, 0
    try:
        with defer_signals():  # An interrupt inside `_open` would leave an MLflow run that nobody closes.
            publisher = _open(request, run, reporter, open_publisher)
        run = run.with_run_id(publisher.run_id)
        run.write()
        publisher.start()
        reporter.note(f"run {run.name}: {total_steps} steps, {request.ranks} rank(s)")
        reporter.begin(total_steps)
        restarts = Restarts(request.max_restarts)
        run, outcome = launch_with_restarts(run, launch, restarts, partial(_report_restart, reporter))
        if outcome is not None and outcome.finished:
            check_results(run)
            status = "FINISHED"
        else:
            status = "KILLED"
    except KeyboardInterrupt:
        status = "KILLED"
    finally:
        if publisher is not None:
            status, unsent_metrics = _close(publisher, run, status)
    return _Ended(run, status, outcome, unsent_metrics)


def _report_restart(reporter: Reporter, run: RunFolder, restart: Restart) -> None:
    where = f"step {restart.step}" if restart.step else "the beginning"
    reporter.note(f"{restart.cause}; attempt {run.attempt} resumes from {where}")


def _choose_run(request: Request) -> RunFolder:
    ranks, name = request.torchrun, request.name
    # torchrun --max-restarts starts the same command again, which must then resume its own run.
    if name is None and ranks is not None and ranks.restarted:
        name = run_of_launch(request.output, request.recipe, ranks.launch)
    run = choose_run(request.output, request.recipe, name, resume=request.resume)
    return replace(run, launch=ranks.launch if ranks is not None else "")


@contextmanager
def locked(
    request: Request, run: RunFolder, report: Callable[[str], None] = lambda text: None
) -> Iterator[RunFolder]:
    """Hold the lock of `run`; yield the run as read again under it.

    Another process may have begun or ended an attempt since `run` was chosen. A new run whose name we made up
    is replaced by one with an unused name. Raises UserError where a run that the person named is being
    trained.
    """
    named_by_us = run.attempt == 1 and run.name != request.name
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(run.lock(report, _stop_after_loss))
            except UserError:
                if not named_by_us:
                    raise
            else:
                again = _choose_run(replace(request, name=run.name, resume=False))
                if again.attempt == run.attempt or not named_by_us:
                    yield again
                    return
        # A run that began in the same second has taken the name: choose another one.
        run = _choose_run(request)


def _open(request: Request, run: RunFolder, reporter: Reporter, open_publisher: OpenPublisher) -> Publisher:
    """Write the run folder, then open the publisher: no MLflow run is left unknown where the driver dies.

    Raises UserError where the publisher cannot be used; a new run is then removed.
    """
    run.write()
    record = RunRecord(run, request.recipe, request.source, store_folder(request.output), request.tags)
    if (note := store_note(request.output)) is not None:
        reporter.note(note)
    try:
        return open_publisher(record, reporter.entry)
    except UserError:
        if run.attempt == 1:
            run.remove()
        raise


def _close(publisher: Publisher, run: RunFolder, status: Status) -> tuple[Status, int]:
    """Send the last metrics, log the model of a finished run, and close the MLflow run.

    Return the status that it was closed with, and the number of metrics that were not sent.
    """
    unsent = 0
    try:
        if status == "KILLED":
            unsent = publisher.finish(LAST_UPLOAD_INTERRUPTED_SECONDS)
        else:
            unsent = publisher.finish(LAST_UPLOAD_SECONDS)
            # The best model is the one to load; there is one only where train.best_metric names a metric.
            publisher.log_results(_model_folder(run) if status == "FINISHED" else None)
    except KeyboardInterrupt:
        if status == "FINISHED":
            status = "KILLED"  # Training is complete; resuming the run publishes the rest.
    finally:
        try:
            with handle_signals(raise_on_second):
                publisher.close(status, CLOSE_INTERRUPTED_SECONDS if status == "KILLED" else CLOSE_SECONDS)
        except KeyboardInterrupt:
            status = "KILLED"
    return status, unsent


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


def _model_folder(run: RunFolder) -> Path | None:
    """Return a folder on this machine with the model to log; None, with a warning, where it cannot be read."""
    try:
        name = best_checkpoint(run.checkpoints) or _newest(run)
        return name and run.checkpoints.bundles(MANIFEST).fetch(name, [MODEL_FILE])  # type: ignore[return-value]
    except OSError as error:
        log.warning("the model was not logged: %s", error)
        return None


def _newest(run: RunFolder) -> str | None:
    return next(reversed(list_checkpoints(run.checkpoints)), None)


def _stop_after_loss(holder: Holder | None) -> None:
    """Stop this process as SIGTERM does: another one has taken its run over, while it could not renew the lease."""
    log_loss(holder)
    os.kill(os.getpid(), signal.SIGTERM)


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
