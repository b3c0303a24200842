"""The run in MLflow around a training: opened before the ranks start, closed whatever ended them.

A tracker that does not answer holds up no training: the publisher sends what it can, and the run knows the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from resnet_dist.data.shards.index import Index
from resnet_dist.driver.hold import has_lost
from resnet_dist.driver.page import begin_page
from resnet_dist.driver.request import Reporter, Request
from resnet_dist.driver.restarts import PATIENCE_SECONDS, patiently
from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.folder import RunFolder, Status, unsent_summary
from resnet_dist.system.signals import handle_signals, raise_on_second
from resnet_dist.tracking.protocol import OpenPublisher, Publisher, RunRecord
from resnet_dist.tracking.spool import Entry, start_seconds, start_tags
from resnet_dist.tracking.store import is_other_tracker, shown_tracker, store_folder, store_note
from resnet_dist.train.checkpoint.folder import best_or_newest

log = logging.getLogger(__name__)

LAST_UPLOAD_SECONDS = CLOSE_SECONDS = 30.0
# The ranks' grace time leaves little after an interruption. Unsent metrics stay in the spool; a resumed run
# sends them.
LAST_UPLOAD_FAILED_SECONDS = (
    5.0  # Something may be about to start the ranks again, and must not wait for a tracker.
)
LAST_UPLOAD_INTERRUPTED_SECONDS = CLOSE_INTERRUPTED_SECONDS = 3.0


class Starts:
    """The starts of a run in this submission, as the spool has them."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}  # by attempt: from the cause of its start to its first step
        self._machines: dict[str, str] = {}  # tags of the machines of the newest attempt

    def add(self, entry: Entry) -> bool:
        """Take what an entry has of a start; report whether it has something."""
        self._seconds.update(start_seconds([entry]))
        self._machines = start_tags([entry]) or self._machines
        return entry.start is not None

    def shown_in(self, run: RunFolder) -> RunFolder:
        return run.with_seconds(self._seconds).with_tags(self._machines)


def open_run(
    request: Request,
    run: RunFolder,
    indexes: Sequence[Index],
    reporter: Reporter,
    open_publisher: OpenPublisher,
    show: Callable[[Entry], None],
) -> tuple[RunFolder, Publisher]:
    """Write the run folder, then open the publisher: no MLflow run is left unknown where the driver dies.

    Raises UserError where the publisher cannot be used; a new run is then removed.
    """
    if is_other_tracker(run.tracker):
        reporter.note(
            f"run {run.name} goes to {shown_tracker() or 'the store in the output folder'} from here on"
        )
    also = tuple(dict.fromkeys((*run.also, *request.also)))
    tracked = replace(
        run, tags={}, tracker=shown_tracker(), also=also, register=request.register or run.register
    )
    run = begin_page(tracked, request, indexes)
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


def close_run(publisher: Publisher, run: RunFolder, status: Status) -> tuple[Status, list[str]]:
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


def record_end(run: RunFolder, reporter: Reporter) -> RunFolder:
    """Write the end of an attempt to the run folder, where the next command looks for it.

    Return the run; KILLED where an interruption has ended the wait for a storage that does not answer.
    """
    try:
        if run.is_lost:  # Its record is the new driver's.
            return run
        if not run.storage.is_gone():  # A new folder would be in the way of the one that was moved.
            # Nobody is to wait for the end of a run that failed: something may be about to continue it.
            patiently(run.write, reporter.note, PATIENCE_SECONDS if run.status == "FINISHED" else 0.0)
    except OSError as error:  # A full disk must not hide what ended the training.
        reporter.note(f"{run.location}: the end of the run was not recorded ({error})")
    except KeyboardInterrupt:
        reporter.note(f"{run.location}: the end of the run was not recorded (interrupted)")
        run = replace(run, status="KILLED")
    if run.unsent and run.status != "FINISHED":  # A finished run is summed up by the command.
        reporter.note(unsent_summary(run))
    return run
