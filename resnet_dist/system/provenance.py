"""Where a run comes from: who started it, with which file and which commit.

A submitted job runs as another user and without the repository around it: `submit` sends it these in variables.
"""

from __future__ import annotations

import getpass
import os
import subprocess
from pathlib import Path

GIT_COMMIT_VARIABLE = "RESNET_DIST_GIT_COMMIT"
SOURCE_VARIABLE = "RESNET_DIST_SOURCE"
USER_VARIABLE = "RESNET_DIST_USER"
GIT_TIMEOUT_SECONDS = 30


def user_name() -> str:
    """Return the name of the user who runs this process, or `uid N` for a number without a name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return f"uid {os.getuid()}"


def git_commit(folder: Path) -> str | None:
    """Return the commit of the repository around `folder`, with -dirty where tracked files differ; None outside one."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
