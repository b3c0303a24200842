"""The MLflow store of an output: the server that a variable names, or a file in a folder. Knows no MLflow."""

from __future__ import annotations

import os
from pathlib import Path

from resnet_dist.runs.storage.open import is_url

URI_VARIABLE = "MLFLOW_TRACKING_URI"
STORE_FILE = "mlflow.db"  # the embedded store, in the output folder
LOCAL_FOLDER = Path("output")  # holds the store of an output that is a URL


def store_folder(output: Path | str) -> Path:
    """Return the folder of the embedded store: the output itself, or a local one where the output is a URL."""
    return LOCAL_FOLDER.absolute() if is_url(output) else Path(output)


def store_note(output: Path | str) -> str | None:
    """Return one line for a run in a bucket without an MLflow server: its metrics stay on the driver's machine."""
    if not is_url(output) or os.environ.get(URI_VARIABLE):
        return None
    return (
        f"{URI_VARIABLE} is not set: MLflow's store is {store_folder(output) / STORE_FILE}, on this machine alone; the "
        "metrics are in the run's spool too"
    )


def tracking_uri(output: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or the URI of the store embedded in the output folder."""
    return os.environ.get(URI_VARIABLE) or f"sqlite:///{output.absolute() / STORE_FILE}"
