"""Send what a tracker did not get of a run, a study or a sweep, and close what a dead driver left open. Repeating it changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from resnet_dist.config import Recipe
from resnet_dist.errors import StorageError, UserError
from resnet_dist.runs.folder import RunFolder, Status
from resnet_dist.runs.group_folder import GroupFolder
from resnet_dist.system.limit import within
from resnet_dist.tracking.backlog import Backlog
from resnet_dist.tracking.mlflow.failure import explain
from resnet_dist.tracking.mlflow.group import sync_parent
from resnet_dist.tracking.mlflow.results import publish_results
from resnet_dist.tracking.mlflow.run import CLOSE_SECONDS, MlflowRun, RunGone, place_of
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Entry, Follower, start_seconds, start_tags
from resnet_dist.tracking.store import TrackerRefuses, tracking_uri
from resnet_dist.train.checkpoint.folder import best_or_newest

OPEN_SECONDS = 60.0


def sync_run(run: RunFolder, output: Path, report: Callable[[str], None]) -> RunFolder:
    """Send what MLflow lacks of `run`, whose lock is held, and close it there; return the run as it is then.

    What could not be sent is in its `unsent`, and reported. Raises UserError where a person must act.
    """
    entries = Follower(run.spool).read()
    run = run.with_seconds(start_seconds(entries)).with_tags(start_tags(entries))
    record = RunRecord(
        run, Recipe.model_validate(run.recipe), output, entries[0].time_ms if entries else None
    )
    # A run without a status had a driver that died: it can be continued, so it is not FAILED.
    status: Status = run.status or "KILLED"
    try:
        mlflow_run, num_sent = _send(record, report)
    except (StorageError, UserError):
        raise
    except Exception as error:  # A server may fail in any way.
        report(f"run {run.name}: not sent; {_outage(error, output)}")
        return run.ended(status, run.unsent or ("the metrics",))
    done = [f"{num_sent:,} metrics sent"] if num_sent else []
    unsent = _publish(mlflow_run, record, status, report, done)
    was = mlflow_run.status()
    if was != status:
        mlflow_run.close(status, CLOSE_SECONDS, _last_ms(entries))
        done.append(f"closed as {status}, was {was}")
    if mlflow_run.refused:
        unsent.append(f"{len(mlflow_run.refused)} values that it does not take")
    report(f"run {run.name}: {', '.join(done) or 'nothing to send'}")
    return run.with_run_id(mlflow_run.run_id).ended(status, unsent)


def sync_group(group: GroupFolder, report: Callable[[str], None]) -> GroupFolder:
    """Send what MLflow lacks of the parent run of a group, whose lock is held, and close it; return the group as it is then.

    Its runs are sent before it, by `sync_run`. Raises UserError as that does.
    """
    status: Status = group.status or "KILLED"
    try:
        found = within(OPEN_SECONDS, lambda: MlflowRun.find_parent(group))
        was = found.status()
    except (StorageError, UserError):
        raise
    except Exception as error:  # A server may fail in any way.
        report(f"{group.title}: not sent; {_outage(error, group.output)}")
        return group.ended(status, group.conclusion, group.unsent or ("everything",))
    unsent = sync_parent(found, group, status, report)
    if not unsent:
        report(f"{group.title}: sent" + (f", closed as {status}, was {was}" if was != status else ""))
    return replace(group, run_id=found.run_id).ended(status, group.conclusion, unsent)


def _outage(error: Exception, output: Path) -> str:
    """Return why a store has not answered, with its place.

    Raises TrackerRefuses where a person must act.
    """
    uri = tracking_uri(output)
    failure = explain(error, uri)
    if failure.is_mistake:
        raise TrackerRefuses(f"{place_of(uri)}: {failure.reason}") from None
    return f"{place_of(uri)}: {failure.reason}"


def _send(record: RunRecord, report: Callable[[str], None]) -> tuple[MlflowRun, int]:
    """Find or create the run in MLflow, describe it and send its metrics; return it with the number of these."""
    found = within(OPEN_SECONDS, lambda: MlflowRun.find(record))
    if found.was_deleted:
        report(f"run {record.run.name} is no more at {found.place}: a new one gets all its metrics there")
    backlog = Backlog(record.run.spool)
    try:
        found.describe(record)
        return found, backlog.send(found)
    except RunGone:  # deleted between the two requests
        again = MlflowRun.find(replace(record, run=record.run.with_run_id(found.run_id)))
        again.describe(record)
        backlog.start_over()
        return again, backlog.send(again)


def _publish(
    run: MlflowRun, record: RunRecord, status: Status, report: Callable[[str], None], done: list[str]
) -> list[str]:
    """Publish what the run has left besides metrics, unless it is there already; return what could not be."""
    checkpoint = None
    if status == "FINISHED":
        checkpoint = best_or_newest(record.run.checkpoints)
    # Files that were logged before are written again with the same content. A driver that died has recorded nothing.
    is_logged = record.run.status is not None and not record.run.unsent
    unsent = publish_results(run, record, checkpoint, report, recipe_logged=is_logged)
    if "the model" in record.run.unsent and not unsent and checkpoint is not None:
        done.append("the model sent")
    return unsent


def _last_ms(entries: list[Entry]) -> int | None:
    return entries[-1].time_ms if entries else None
