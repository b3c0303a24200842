"""The driver: from a recipe to a finished run. It prepares, starts the ranks, follows them, and closes the run.

Everything that can be refused is refused before Ray starts or a file is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from resnet_dist.driver.preflight import (
    check_data,
    check_request,
    resolve_paths,
)
from resnet_dist.driver.request import Interrupted, Reporter, Request, Summary
from resnet_dist.errors import UserError
from resnet_dist.launch.attempt import RankLauncher
from resnet_dist.launch.local import local_launcher
from resnet_dist.launch.torchrun import torchrun_launcher
from resnet_dist.runs.choose import choose_run, run_of_launch
from resnet_dist.runs.folder import RunFolder, Status
from resnet_dist.system.signals import interrupt, interrupt_second, signals_call, signals_held
from resnet_dist.tracking.protocol import OpenPublisher, Publisher, RunRecord
from resnet_dist.train.checkpoint.folder import best_checkpoint, list_checkpoints

log = logging.getLogger(__name__)

LAST_UPLOAD_SECONDS = CLOSE_SECONDS = 30.0
# Beside the ranks' grace time little is left: what is not sent is in the spool, and a continued run sends it.
LAST_UPLOAD_INTERRUPTED_SECONDS = CLOSE_INTERRUPTED_SECONDS = 3.0


def run_training(request: Request, reporter: Reporter, open_publisher: OpenPublisher) -> Summary:
    """Train `request.recipe` to its end.

    Raises UserError before anything is started; Interrupted after SIGINT or SIGTERM (KeyboardInterrupt before
    there is a run); TrainingError or RankFailed where the training failed. The MLflow run is closed on every
    way out.
    """
    start = time.monotonic()
    request = replace(request, recipe=resolve_paths(request.recipe, request.output))
    check_request(request)
    with signals_call(interrupt), ExitStack() as stack:
        run = _choose_run(request)
        indexes, total_steps = check_data(
            request.recipe, reporter, is_new=not list_checkpoints(run.checkpoints)
        )
        run = stack.enter_context(locked(request, run))  # until its ranks are gone
        run = run.with_data([index.digest() for index in indexes])
        launch = stack.enter_context(_launcher(request, reporter))
        publisher: Publisher | None = None
        status: Status = "FAILED"
        outcome, unsent = None, 0
        try:
            with signals_held():  # a run that was begun in MLflow must be closed
                publisher = _open(request, run, reporter, open_publisher)
            run = run.with_run_id(publisher.run_id)
            run.write()
            publisher.start()
            reporter.note(f"run {run.name}: {total_steps} steps, {request.world_size} rank(s)")
            reporter.begin(total_steps)
            outcome = launch(run)
            status = "FINISHED" if outcome is not None and outcome.finished else "KILLED"
        except KeyboardInterrupt:
            status = "KILLED"
        finally:
            if publisher is not None:
                status, unsent = _close(publisher, run, status)
    if outcome is None or status == "KILLED":
        raise Interrupted(run, outcome.step if outcome else None)
    return Summary(run, outcome, _newest(run), time.monotonic() - start, unsent)


def _choose_run(request: Request) -> RunFolder:
    ranks, name = request.torchrun, request.name
    if name is None and ranks is not None and ranks.restarted:  # --max-restarts starts the same command again
        name = run_of_launch(request.output, request.recipe, ranks.launch)
    run = choose_run(request.output, request.recipe, name, resume=request.resume)
    return replace(run, launch=ranks.launch if ranks is not None else "")


@contextmanager
def locked(request: Request, run: RunFolder) -> Iterator[RunFolder]:
    """`run` as it is under its lock: since it was chosen, another process may have begun or ended an attempt."""
    named_by_us = run.attempt == 1 and run.name != request.name
    while True:
        with ExitStack() as stack:
            try:
                stack.enter_context(run.lock())
            except UserError:
                if not named_by_us:
                    raise
            else:
                again = _choose_run(replace(request, name=run.name, resume=False))
                if again.attempt == run.attempt or not named_by_us:
                    yield again
                    return
        run = _choose_run(request)  # another that began in the same second has the name


def _open(request: Request, run: RunFolder, reporter: Reporter, open_publisher: OpenPublisher) -> Publisher:
    """The tracker of a run whose folder is there first: a driver that dies between the two leaves no orphan."""
    run.write()
    try:
        return open_publisher(
            RunRecord(run, request.recipe, request.source, request.output, request.tags), reporter.entry
        )
    except UserError:
        if run.attempt == 1:
            run.remove()
        raise


def _close(publisher: Publisher, run: RunFolder, status: Status) -> tuple[Status, int]:
    """Send what is left, log the model of a run that finished, close the run: its status, metrics not sent."""
    unsent = 0
    try:
        if status == "KILLED":
            unsent = publisher.finish(LAST_UPLOAD_INTERRUPTED_SECONDS)
        else:
            unsent = publisher.finish(LAST_UPLOAD_SECONDS)
            # Where a recipe names a metric to choose by, its best model is what one wants to load.
            model = best_checkpoint(run.checkpoints) or _newest(run)
            publisher.log_results(model if status == "FINISHED" else None)
    except KeyboardInterrupt:
        if status == "FINISHED":
            status = "KILLED"  # all is trained; continuing the run does the rest
    finally:
        try:
            with signals_call(interrupt_second):
                publisher.close(status, CLOSE_INTERRUPTED_SECONDS if status == "KILLED" else CLOSE_SECONDS)
        except KeyboardInterrupt:
            status = "KILLED"
    return status, unsent


def _newest(run: RunFolder) -> Path | None:
    return next(reversed(list_checkpoints(run.checkpoints)), None)


def _launcher(request: Request, reporter: Reporter) -> AbstractContextManager[RankLauncher]:
    """Choose how the ranks start, and find the resources for them. Raises UserError."""
    if request.torchrun is not None:
        return nullcontext(torchrun_launcher(request.recipe, request.torchrun, gpu=request.gpu))
    if request.local:
        return nullcontext(local_launcher(request.recipe, gpu=request.gpu))
    return _import_ray_train().ray_launcher(  # type: ignore[no-any-return]
        request.recipe,
        workers=request.workers,
        gpu=request.gpu,
        address=request.address,
        report=reporter.note,
    )


def _import_ray_train() -> ModuleType:
    """Import Ray late: `--local` and torchrun work without it. Raises UserError where it is not installed."""
    try:
        with signals_held():  # an exception in the middle of Ray's import leaves it broken
            from resnet_dist.launch import ray_train
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "ray":  # an installation that is broken
            raise
        raise UserError(f"Ray is not installed ({error}); --local trains in this process") from None
    return ray_train
