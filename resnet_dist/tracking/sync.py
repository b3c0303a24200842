"""Send what a tracker did not get of the runs of an output folder, and close what a dead driver left open."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RUNS_FOLDER, RunFolder, RunHeld, read_run
from resnet_dist.tracking.open import check_tracker, has_mlflow
from resnet_dist.tracking.store import URI_VARIABLE, shown_tracker


def sync_runs(output: Path, name: str | None, report: Callable[[str], None]) -> bool:
    """Send what MLflow lacks of the named run, or of all runs of `output`; report whether nothing is left to send.

    Runs that are being trained, and those that were sent completely, are skipped. Raises UserError where a person must
    act, and where there is no such run.
    """
    check_tracker(output, "")
    if not has_mlflow():
        raise UserError("MLflow, which this command sends runs to, is not installed")
    from resnet_dist.tracking.mlflow.sync import sync_run

    folders = [output / RUNS_FOLDER / name] if name else sorted((output / RUNS_FOLDER).glob("*"))
    runs = [run for folder in folders if (run := read_run(folder)) is not None]
    if not runs:
        raise UserError(f"{output / RUNS_FOLDER}: no run{f' named {name}' if name else 's'} there")
    left = 0
    for run in runs:
        if name is None and run.status is not None and not run.unsent:
            continue
        try:
            with run.lock():
                again = read_run(run.path) or run  # Its driver may have ended since.
                _check_same_tracker(again)
                synced = sync_run(again, output, report)
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
