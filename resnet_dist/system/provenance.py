"""Describe the origin of a run: the user who started it, the recipe file and the git commit.

A submitted job runs as another user and outside the repository, so `submit` sends it these in variables.
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
    """Return the name of the user who runs this process, or `uid N` where the user has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container may run under a user id without a name.
        return f"uid {os.getuid()}"


def git_commit(folder: Path) -> str | None:
    """Return the commit of the repository around `folder`; None outside a repository.

    The commit ends in -dirty where tracked files differ from it.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
