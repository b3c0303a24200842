"""Close what drivers that died left RUNNING in a tracker, for every command that looks at runs or begins one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from resnet_dist.runs.folder import RUNS_FOLDER
from resnet_dist.runs.group_folder import GROUP_KINDS, GroupHeld, held, read_group
from resnet_dist.runs.storage.lease import is_abandoned, quiet_seconds
from resnet_dist.runs.storage.open import is_url
from resnet_dist.tracking.locate import folder_of
from resnet_dist.tracking.logged_run import LoggedRun
from resnet_dist.tracking.open import has_mlflow
from resnet_dist.tracking.protocol import (
    GroupPublisher,
    GroupRecord,
    OpenGroup,
    OpenPublisher,
    Publisher,
    RunRecord,
)
from resnet_dist.tracking.spool import Entry
from resnet_dist.tracking.store import STORE_FILE, sqlite_file, store_folder
from resnet_dist.tracking.sync import sync_one, sync_one_group

if TYPE_CHECKING:
    from resnet_dist.tracking.mlflow.reading import Tracker

Report = Callable[[str], None]
# A driver of another machine that is so long without a heartbeat, which comes every few seconds, is worth a line.
QUIET_MINUTES = 2.0
# What starts a dead driver again, such as a supervisor, needs the lease of its run, and does so within minutes.
RESTART_SECONDS = 300.0
RUNNING = "attributes.status = 'RUNNING'"


def close_abandoned(
    tracker: Tracker, output: Path | str, report: Report, quiet: float = 0.0, but_group: str = ""
) -> None:
    """Close the runs that are RUNNING in a tracker and whose driver is gone, as their folders show.

    Never waits for a lease, and leaves runs whose folder is not on this machine. A run that cannot be closed is reported:
    the command that looks continues. quiet: leaves runs whose driver gave a sign within so many seconds. but_group: a
    study or sweep whose runs are left. Raises what the tracker raises.
    """
    for run in tracker.runs(tracker.experiments(), RUNNING):
        if but_group and run.group == but_group:
            continue
        if run.folder is not None and is_url(run.folder) and not run.folder.startswith(f"{output}/"):
            continue  # Another person's bucket is not asked.
        try:
            _close(tracker, run, output, report, quiet)
        # A run of another version, or an answer of the tracker, must not end the command.
        except Exception as error:
            report(f"run {run.name}: left RUNNING; {error}")


def closing_abandoned(open_publisher: OpenPublisher) -> OpenPublisher:
    """Return a function that opens a publisher and then closes what is abandoned, beside the training.

    Only then: the run that begins may itself be one that a dead driver left, and its lease is this process's now.
    """

    def opened(record: RunRecord, on_entry: Callable[[Entry], None]) -> Publisher:
        publisher = open_publisher(record, on_entry)
        _close_beside(record.output, record.run.location.removesuffix(f"/{RUNS_FOLDER}/{record.run.name}"))
        return publisher

    return opened


def closing_beside_group(open_group: OpenGroup) -> OpenGroup:
    """Return a function that opens the publisher of a study or sweep, and closes what is abandoned but its own runs.

    These are resumed soon, and then closed by their own drivers.
    """

    def opened(record: GroupRecord) -> GroupPublisher:
        publisher = open_group(record)
        _close_beside(record.output, record.output, record.name)
        return publisher

    return opened


def _close_beside(store: Path, output: Path | str, but_group: str = "") -> None:
    """Close what is abandoned in a daemon thread: nothing waits for it."""

    def close() -> None:
        from resnet_dist.tracking.mlflow.reading import Tracker

        with suppress(Exception):  # Whatever fails, the next command that looks tries it again.
            close_abandoned(Tracker.open(store), output, lambda text: None, RESTART_SECONDS, but_group)

    if has_mlflow():
        Thread(target=close, name="abandoned", daemon=True).start()


def _close(tracker: Tracker, run: LoggedRun, output: Path | str, report: Report, quiet: float) -> None:
    if run.folder is None:
        _close_group(run, output, report)
        return
    found = folder_of(run, output)
    if found is None:
        # In a store of its own, a folder that is gone was removed by a person. On a server, the same path may be that of
        # another machine, whose run lives.
        own = sqlite_file(tracker.uri) == store_folder(output) / STORE_FILE
        if own and not is_url(run.folder) and Path(run.folder).is_relative_to(Path(output).absolute()):
            tracker.close(run, "KILLED")
            report(f"run {run.name}: closed as KILLED, was RUNNING; its folder was removed")
        return
    if quiet and quiet_seconds(found.storage) < quiet:
        return
    gone = is_abandoned(found.storage)
    if gone is None:
        minutes = quiet_seconds(found.storage) / 60
        if minutes >= QUIET_MINUTES:
            report(
                f"run {run.name}: RUNNING, but its driver on another machine has given no sign for {minutes:.0f} min; "
                f"`resnet-dist sync {run.name}` closes it where it is dead"
            )
    elif gone and found.status is not None:  # Only the tracker missed the end.
        tracker.close(run, found.status)
        report(f"run {run.name}: closed as {found.status}, was RUNNING")
    elif gone:
        sync_one(found, store_folder(output), report)


def _close_group(run: LoggedRun, output: Path | str, report: Report) -> None:
    """Close the run of a study or a sweep, which has no folder among those of runs."""
    kind = next((kind for kind in GROUP_KINDS if kind.tag in run.tags), None)
    if kind is None:
        return
    folder = store_folder(output) / kind.folder / run.tags[kind.tag]
    if read_group(folder) is None:
        return
    try:
        with held(folder):
            pass
    except GroupHeld:  # Its driver lives.
        return
    sync_one_group(folder, report)
