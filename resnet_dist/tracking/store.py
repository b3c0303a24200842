"""The MLflow store of an output folder: the server that a variable names, or a file. Knows no MLflow."""

from __future__ import annotations

import os
from pathlib import Path

URI_VARIABLE = "MLFLOW_TRACKING_URI"
STORE_FILE = "mlflow.db"  # the embedded store, in the output folder


def tracking_uri(output: Path) -> str:
    """Return MLFLOW_TRACKING_URI, or the URI of the store embedded in the output folder."""
    return os.environ.get(URI_VARIABLE) or f"sqlite:///{output.absolute() / STORE_FILE}"
