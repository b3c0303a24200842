"""The parts of a submitted job that depend on the cluster: how it finds this package, and what must not travel with it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path

from resnet_dist import __version__
from resnet_dist.tracking.store import URI_VARIABLE, without_password

# In the working folder of a job, beside the files that a person sends with it.
JOB_FOLDER = ".resnet-dist"
RECIPE_FILE, START_FILE = f"{JOB_FOLDER}/recipe.json", f"{JOB_FOLDER}/start_job.sh"
# Ray stores the environment of a job, and shows it to everyone who can open the dashboard.
CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "DATABRICKS_TOKEN",
)


def start_file_text() -> str:
    """Return the script that starts a job."""
    return files("resnet_dist.launch.ray_cluster").joinpath(Path(START_FILE).name).read_text()


def start_command(arguments: Sequence[str]) -> list[str]:
    """Return the command that runs `resnet-dist` with `arguments` in the working folder of a job."""
    return ["sh", START_FILE, __version__, *arguments]


def credentials_left_out(sent: Collection[str] = ()) -> str:
    """Return the note on credentials of MLflow that stay here; empty where there are none. sent: variables that go."""
    names = [name for name in CREDENTIALS if os.environ.get(name) and name not in sent]
    uri = os.environ.get(URI_VARIABLE, "")
    if without_password(uri) != uri and URI_VARIABLE not in sent:
        names.append(f"user and password of {URI_VARIABLE}")
    if not names:
        return ""
    return (
        f"not sent with the job: {', '.join(names)}, because Ray shows the environment of a job on its dashboard; the "
        "cluster needs them itself: in the environment of `ray start` on the head, or in ~/.mlflow/credentials there"
    )
