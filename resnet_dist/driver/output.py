"""Check the output, a folder or a URL, before anything is prepared or started."""

from __future__ import annotations

import os
import re
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.runs.folder import RUNS_FOLDER
from resnet_dist.runs.storage.open import is_url, open_storage
from resnet_dist.system.command import quoted
from resnet_dist.tracking.store import ARTIFACTS_FOLDER, STORE_FILE, store_folder, tracking_uri

# SQLAlchemy reads these in the address of a SQLite file as the start of options, or as another character.
_NOT_IN_SQLITE = re.compile(r"\?|%[0-9A-Fa-f]{2}")


def check_output(output: Path | str) -> None:
    """Raise UserError, and leave nothing behind, where runs or MLflow's store cannot be kept at `output`."""
    storage, store = open_storage(output), store_folder(output)
    if problem := _problem_of_address(store):
        raise UserError(f"--output {quoted(str(output))}: {problem}")
    # The artifacts lie in a folder's own store; a missing folder is none of it.
    storage.check(RUNS_FOLDER, ARTIFACTS_FOLDER)
    file = store / STORE_FILE
    if file.exists() and not os.access(file, os.W_OK):
        raise UserError(
            f"--output {quoted(str(output))}: {quoted(str(file))} cannot be written (no permission); give another folder"
        )


def check_place(output: Path | str) -> None:
    """Check a folder as `check_output` does. A bucket, of which that takes requests, is left to the driver.

    Commands call it before they look for MLflow's store, which lies in the folder: its errors name a file that nobody typed.
    """
    if not is_url(output):
        check_output(output)


def _problem_of_address(store: Path) -> str | None:
    """Return what keeps MLflow's store from the folder `store`; None where it may lie there, or lies elsewhere."""
    found = _NOT_IN_SQLITE.search(str(store.absolute()))
    if found is None or not tracking_uri(store).startswith("sqlite:"):
        return None
    return (
        f"MLflow's store cannot lie there, because its path contains {found[0]!r}; give another folder, or name a "
        "server in MLFLOW_TRACKING_URI"
    )
