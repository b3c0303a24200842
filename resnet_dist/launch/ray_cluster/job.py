"""The parts of a submitted job that depend on the cluster: how it finds this package, and what must not travel with it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from resnet_dist import __version__
from resnet_dist.tracking.store import URI_VARIABLE, without_password

START_FILE = "start_job.sh"
# Ray stores the environment of a job, and shows it to everyone who can open the dashboard.
CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "DATABRICKS_TOKEN",
)


def add_start_file(folder: Path) -> None:
    """Write the script that starts a job into the folder that travels with it."""
    text = files("resnet_dist.launch.ray_cluster").joinpath(START_FILE).read_text()
    (folder / START_FILE).write_text(text)


def start_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs `resnet-dist` with `arguments` in that folder, on the cluster."""
    return ["sh", START_FILE, __version__, *arguments]


def credentials_left_out() -> str:
    """Return the note on credentials of MLflow that stay here; empty where there are none."""
    names = [name for name in CREDENTIALS if os.environ.get(name)]
    uri = os.environ.get(URI_VARIABLE, "")
    if without_password(uri) != uri:
        names.append(f"user and password of {URI_VARIABLE}")
    if not names:
        return ""
    return (
        f"not sent with the job: {', '.join(names)}, because Ray shows the environment of a job on its dashboard; the "
        "cluster needs them itself: in the environment of `ray start` on the head, or in ~/.mlflow/credentials there"
    )
