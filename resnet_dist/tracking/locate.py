"""Find the folder of a run by what a person calls it: its name, its path or URL, or its id in MLflow."""

from __future__ import annotations

import difflib
from pathlib import Path

from resnet_dist.config.part import NAME
from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RUNS_FOLDER, RunFolder, read_run
from resnet_dist.runs.storage.open import is_url, open_storage
from resnet_dist.system.files import expanded
from resnet_dist.tracking.logged_run import LoggedRun
from resnet_dist.tracking.open import has_mlflow
from resnet_dist.tracking.store import TrackerAway, TrackerRefuses, store_folder


def locate_run(name: str, output: Path | str, flag: str) -> RunFolder:
    """Return a run of `output`, or one that is elsewhere. flag: begins the message where there is none.

    Raises UserError for a mistake, and TrackerAway where only a tracker that does not answer may know the run.
    """
    if "/" in name or is_url(name):
        found = read_run(open_storage(name if is_url(name) else expanded(name).absolute()))
        if found is None:
            raise UserError(f"{flag}: {name} is no folder of a run")
        return found
    runs = open_storage(output).at(RUNS_FOLDER)
    try:
        found = read_run(runs.at(name)) or _of_tracker(name, output)
    except TrackerAway as error:
        raise TrackerAway(f"{flag}: no run named {name} in {runs.location}, and {error}") from None
    if found is not None:
        return found
    known = runs.folders()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; it has {', '.join(known[:5]) or 'no runs'}"
    raise UserError(f"{flag}: no run named {name} in {runs.location}{hint}")


def run_id_of(name: str, output: Path | str) -> str | None:
    """Return the id in MLflow of a run of `output`; None where it has no such run."""
    found = read_run(open_storage(output).at(RUNS_FOLDER).at(name)) if NAME.fullmatch(name) else None
    return None if found is None else found.run_id


def folder_of(run: LoggedRun, output: Path | str) -> RunFolder | None:
    """Return the folder of a run, also where its output was moved; None where this machine does not have it."""
    here = open_storage(output).at(RUNS_FOLDER).at(run.name)
    places = [here] if run.folder is None else [open_storage(run.folder), here]
    for place in places:
        found = read_run(place)
        if found is not None and found.key == run.key:
            return found
    return None


def _of_tracker(name: str, output: Path | str) -> RunFolder | None:
    """Return the folder of a run that the tracker knows; None where it does not. Raises TrackerAway, TrackerRefuses."""
    if not has_mlflow():
        return None
    from resnet_dist.tracking.mlflow.reading import Tracker

    try:
        return folder_of(Tracker.open(store_folder(output)).find(name), output)
    except TrackerRefuses:
        raise
    except UserError:  # It has no such run, or there is no store yet.
        return None
