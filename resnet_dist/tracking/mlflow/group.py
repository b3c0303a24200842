"""The publisher of a study or a sweep: an MLflow run that is the parent of its runs and holds their result."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mlflow.exceptions import MlflowException

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import Status
from resnet_dist.runs.group_folder import GroupFolder, read_group
from resnet_dist.system.limit import within
from resnet_dist.system.redact import redact
from resnet_dist.tracking.mlflow.failure import explain
from resnet_dist.tracking.mlflow.publisher import START_SECONDS, START_SECONDS_OF_FILE
from resnet_dist.tracking.mlflow.run import CLOSE_SECONDS, GONE, PARENT_TAG, MlflowRun, place_of
from resnet_dist.tracking.protocol import GroupRecord
from resnet_dist.tracking.store import shown_tracker, sqlite_file, tracking_uri

log = logging.getLogger(__name__)

Task = tuple[str, Callable[[], object]]  # the name of what is sent, and a function that sends it


class MlflowGroup:
    """The parent run, opened before the first run trains, or at the end where its store does not answer before.

    Later failures are warnings and never stop its runs; `sync` sends what is in `unsent` then.
    """

    def __init__(self, record: GroupRecord) -> None:
        """Create the parent run, or resume the one that its folder names.

        Raises UserError for a person's mistake, such as a wrong password.
        """
        self._uri = tracking_uri(record.output)
        self._group = _begun(record)
        self._run: MlflowRun | None = None
        self._unsent: list[str] = []
        # Write the key first: a process that died before it knew the id finds its run by the key.
        self._group.write()
        seconds = START_SECONDS if sqlite_file(self._uri) is None else START_SECONDS_OF_FILE
        try:
            self._run = within(seconds, self._open)
        except Exception as error:  # A server may fail in any way; the runs train.
            failure = explain(error, self._uri)
            if failure.is_mistake:
                raise UserError(f"{place_of(self._uri)}: {failure.reason}") from None
            log.warning(
                "%s: %s; %s is published there at its end",
                place_of(self._uri),
                failure.reason,
                self._group.title,
            )

    @property
    def unsent(self) -> tuple[str, ...]:
        return tuple(self._unsent)

    def member_tags(self) -> dict[str, str]:
        """Return the tags that make a run one of the group."""
        parent = {} if self._run is None else {PARENT_TAG: self._run.run_id}
        return {**parent, self._group.kind.tag: self._group.name}

    def is_finished(self, run_id: str) -> bool:
        """Report whether the run was closed as FINISHED; false for an unknown run, and where MLflow does not answer."""
        if self._run is None:
            return False
        run = self._run
        try:
            return str(within(START_SECONDS, lambda: run.client.get_run(run_id)).info.status) == "FINISHED"
        except Exception:  # An unknown run, or a server that may fail in any way
            return False

    def log_files(self, *files: Path) -> None:
        self._send([(file.name, _logging(self._opened, file)) for file in files])

    def close(self, status: Status, conclusion: str) -> None:
        self._send([("the conclusion", lambda: self._opened().set_tags({"conclusion": conclusion}))])
        self._send([("the status", lambda: self._opened().close(status, CLOSE_SECONDS))])
        self._group = self._group.ended(status, conclusion, self._unsent)
        try:
            self._group.write()
        except OSError as error:  # A full disk must not hide what ended the group.
            log.warning("%s: its end was not recorded: %s", self._group.path, error)

    def _send(self, tasks: Sequence[Task]) -> None:
        if self._run is None and self._unsent:  # One wait at the end, for the first thing to send, is enough.
            self._unsent += [name for name, _ in tasks]
            return
        self._unsent += send(tasks, self._group, self._uri, log.warning)

    def _opened(self) -> MlflowRun:
        """Return the parent run. One that could not be opened before the runs is opened now, and gets its children."""
        if self._run is None:
            self._run = within(START_SECONDS, self._open)
            adopt_runs(self._run, self._group)
        return self._run

    def _open(self) -> MlflowRun:
        run = MlflowRun.open_parent(self._group)
        self._group = replace(self._group, run_id=run.run_id)
        self._group.write()
        return run


def send(tasks: Sequence[Task], group: GroupFolder, uri: str, report: Callable[[str], object]) -> list[str]:
    """Send one thing after another; return the names of those from the first failure on, whose reason is reported."""
    for number, (_, task) in enumerate(tasks):
        try:
            task()
        except Exception as error:  # A server may fail in any way; the runs are trained.
            unsent = [name for name, _ in tasks[number:]]
            reason = explain(error, uri).reason
            report(f"{place_of(uri)} did not get {' and '.join(unsent)} of {group.title}: {reason}")
            return unsent
    return []


def sync_parent(
    run: MlflowRun, group: GroupFolder, status: Status, report: Callable[[str], None]
) -> list[str]:
    """Send the parent run of a group, which is open, all that its folder holds, and close it; return what could not be sent."""
    tasks: list[Task] = [
        ("the description", lambda: run.describe_group(group)),
        ("its runs", lambda: adopt_runs(run, group)),
        *((file.name, _logging(lambda: run, file)) for file in group.files),
        ("the conclusion", lambda: run.set_tags({"conclusion": group.conclusion})),
        ("the status", lambda: run.close(status, CLOSE_SECONDS)),
    ]
    return send(tasks, group, run.uri, report)


def adopt_runs(parent: MlflowRun, group: GroupFolder) -> None:
    """Make the runs of the group, which may have been created without it, children of `parent`."""
    for run in group.runs():
        if run.run_id is None:
            continue  # It gets the tag when it is created.
        try:
            parent.client.set_tag(run.run_id, PARENT_TAG, parent.run_id)
        except MlflowException as error:
            if error.error_code not in GONE:
                raise


def _begun(record: GroupRecord) -> GroupFolder:
    """Return the group as it is when its driver begins."""
    known = read_group(record.folder)
    return GroupFolder(
        record.folder,
        key=known.key if known else uuid.uuid4().hex,
        run_id=known.run_id if known else None,
        experiment=record.described.experiment,
        description=redact(record.described.description),
        source=record.source,
        tracker=shown_tracker(),
    )


def _logging(opened: Callable[[], MlflowRun], file: Path) -> Callable[[], None]:
    """Return a function that logs a file with the run that `opened` returns."""

    def task() -> None:
        run = opened()
        run.client.log_artifact(run.run_id, str(file))

    return task
