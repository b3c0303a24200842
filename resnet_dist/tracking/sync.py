"""Send what a tracker did not get of the runs of an output folder, and close what a dead driver left open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RUNS_FOLDER, RunFolder, RunHeld, read_run
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.tracking.open import check_tracker, has_mlflow
from resnet_dist.tracking.store import URI_VARIABLE, shown_tracker, store_folder


def sync_runs(output: Path | str, name: str | None, report: Callable[[str], None]) -> bool:
    """Send what MLflow lacks of the named run, or of all runs of `output`; report whether nothing is left to send.

    Runs that are being trained, and those that were sent completely, are skipped. Raises UserError where a person must
    act, and where there is no such run.
    """
    store = store_folder(output)
    check_tracker(store, "")
    if not has_mlflow():
        raise UserError("MLflow, which this command sends runs to, is not installed")
    from resnet_dist.tracking.mlflow.sync import sync_run

    place = open_storage(output).at(RUNS_FOLDER)
    found = (read_run(place.at(folder)) for folder in ([name] if name else place.folders()))
    runs = [run for run in found if run is not None]
    if not runs:
        raise UserError(f"{place.location}: no run{f' named {name}' if name else 's'} there")
    left = 0
    for run in runs:
        if name is None and run.status is not None and not run.unsent:
            continue
        try:
            with run.lock(report):
                again = read_run(run.storage) or run  # Its driver may have ended since.
                _check_same_tracker(again)
                synced = sync_run(again, store, report)
                synced.write()
                left += bool(synced.unsent)
        except RunHeld:
            left += 1
            report(f"run {run.name}: is being trained by another process, which sends it")
    if name is None:
        report(f"{len(runs) - left} of {len(runs)} runs are complete in MLflow")
    return not left


def _check_same_tracker(run: RunFolder) -> None:
    """Raise UserError where the run belongs to another tracker than the one that the environment names."""
    if run.tracker is not None and run.tracker != shown_tracker():
        advice = f"set {URI_VARIABLE} to that address" if run.tracker else f"unset {URI_VARIABLE}"
        now = shown_tracker() or "the store in the output folder"
        raise UserError(
            f"run {run.name} is kept in {run.tracker or 'the store in the output folder'}, not in {now}; {advice}"
        )
