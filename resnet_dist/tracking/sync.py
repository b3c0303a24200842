"""Send what a tracker did not get of the runs, studies and sweeps of an output folder, and close what a dead driver left open."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RUNS_FOLDER, RunFolder, RunHeld, read_run
from resnet_dist.runs.group_folder import GroupFolder, GroupHeld, groups_in, held, kind_of, read_group
from resnet_dist.runs.storage.open import is_url, open_storage
from resnet_dist.runs.storage.protocol import Storage
from resnet_dist.tracking.also.fan_out import send_to_others
from resnet_dist.tracking.open import check_tracker, has_mlflow
from resnet_dist.tracking.store import (
    URI_VARIABLE,
    TrackerRefuses,
    is_other_tracker,
    shown_tracker,
    store_folder,
)

Report = Callable[[str], None]


def sync_runs(output: Path | str, name: str | None, report: Report) -> bool:
    """Send what MLflow lacks of the named run, study or sweep, or of all of `output`; report whether nothing is left to send.

    Of all, those that are being trained, belong to another tracker or cannot be sent are skipped with a line each.
    Raises UserError where a person must act for a named one or for the tracker, and where there is no such run.
    """
    store = store_folder(output)
    check_tracker(store, "")
    if not has_mlflow():
        raise UserError("MLflow, which this command sends runs to, is not installed")
    place = open_storage(output).at(RUNS_FOLDER)
    groups = [] if is_url(output) else groups_in(store)
    if name is None:
        return _sync_all(place, groups, store, report)
    run, named = read_run(place.at(name)), [folder for folder in groups if folder.name == name]
    if run is None and not named:
        raise UserError(f"{place.location}: no run named {name} there")
    sent = [sync_one(run, store, report)] if run is not None else []
    for folder in named:
        members = [member for member in _group_in(folder).runs() if not _is_complete(member)]
        sent += [sync_one(member, store, report) for member in members]
        sent.append(sync_one_group(folder, report))
    return all(sent)


def _sync_all(place: Storage, groups: list[Path], store: Path, report: Report) -> bool:
    """Send whatever is not complete in MLflow; report whether nothing is left."""

    def send_run(name: str) -> bool | None:
        run = read_run(place.at(name))
        return None if run is None else _is_complete(run) or sync_one(run, store, report)

    def send_group(folder: Path) -> bool:
        return _is_complete(_group_in(folder)) or sync_one_group(folder, report)

    # The groups come last: the runs that they adopt then exist.
    tasks: list[tuple[str, Callable[[], bool | None]]] = [
        (f"run {name}", partial(send_run, name)) for name in place.folders()
    ]
    tasks += [(title_of(folder), partial(send_group, folder)) for folder in groups]
    complete: list[str] = []
    left: list[str] = []
    for name, task in tasks:
        try:
            is_sent = task()
        except TrackerRefuses:
            raise
        except (UserError, OSError) as error:
            report(f"{name}: skipped; {error}")
            is_sent = False
        if is_sent is not None:
            (complete if is_sent else left).append(name)
    if not complete and not left:
        raise UserError(f"{place.location}: no runs there")
    kinds = list(dict.fromkeys([RUNS_FOLDER, *(kind_of(folder).folder for folder in groups)]))
    things = " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))
    rest = f"; left: {', '.join(left)}" if left else ""
    report(f"{len(complete)} of {len(complete) + len(left)} {things} are complete in MLflow{rest}")
    return not left


def sync_one(run: RunFolder, store: Path, report: Report) -> bool:
    """Send a run and close it; report whether MLflow has everything then. Raises UserError where a person must act."""
    from resnet_dist.tracking.mlflow.sync import sync_run

    try:
        with run.lock(report):
            again = read_run(run.storage) or run  # Its driver may have ended since.
            _check_same_tracker(again.tracker, f"run {run.name}")
            synced = sync_run(again, store, report)
            others = send_to_others(again, report)
            synced = replace(synced, unsent=(*synced.unsent, *others))
            synced.write()
    except RunHeld:
        report(f"run {run.name}: is being trained by another process, which sends it")
        return False
    return not synced.unsent


def sync_one_group(folder: Path, report: Report) -> bool:
    """Send the parent run of a study or sweep; report whether MLflow has everything then."""
    from resnet_dist.tracking.mlflow.sync import sync_group

    try:
        with held(folder):
            group = _group_in(folder)
            if group.experiment is None:
                raise UserError(
                    f"{group.title} was begun by an earlier version, which recorded too little; the `study` command "
                    "that began it continues it"
                )
            _check_same_tracker(group.tracker, group.title)
            synced = sync_group(group, report)
            synced.write()
    except GroupHeld:
        report(f"{title_of(folder)}: is being trained by another process, which sends it")
        return False
    return not synced.unsent


def title_of(folder: Path) -> str:
    return f"{kind_of(folder).word} {folder.name}"


def _group_in(folder: Path) -> GroupFolder:
    """Return the study or sweep in a folder that has its file. Raises UserError."""
    group = read_group(folder)
    assert group is not None
    return group


def _is_complete(kept: RunFolder | GroupFolder) -> bool:
    """Report whether MLflow has everything of a run or group whose driver has ended."""
    # An earlier version did not record the end of a study.
    of_earlier_version = isinstance(kept, GroupFolder) and kept.experiment is None and kept.run_id is not None
    return of_earlier_version or (kept.status is not None and not kept.unsent)


def _check_same_tracker(tracker: str | None, name: str) -> None:
    """Raise UserError where a run or study is kept in another tracker than the one that the environment names."""
    if is_other_tracker(tracker):
        advice = f"set {URI_VARIABLE} to that address" if tracker else f"unset {URI_VARIABLE}"
        now = shown_tracker() or "the store in the output folder"
        raise UserError(
            f"{name} is kept in {tracker or 'the store in the output folder'}, not in {now}; {advice}"
        )
