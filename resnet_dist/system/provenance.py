"""Describe the origin of a run: the user who started it, the recipe file and the git commit.

A submitted job runs as another user and outside the repository, so `submit` sends it these in variables.
"""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

GIT_COMMIT_VARIABLE = "RESNET_DIST_GIT_COMMIT"
SOURCE_VARIABLE = "RESNET_DIST_SOURCE"
USER_VARIABLE = "RESNET_DIST_USER"
GIT_SECONDS = 0.8  # for all of git: no run waits longer for its origin


def user_name() -> str:
    """Return the name of the user who runs this process, or `uid N` where the user has no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container may run under a user id without a name.
        return f"uid {os.getuid()}"


def git_commit(folder: Path) -> str | None:
    """Return the commit of the repository around `folder`; None outside a repository, and where git refuses or hangs.

    The commit ends in -dirty where tracked files differ from it, and in -unchecked where that takes too long to see.
    """
    deadline = time.monotonic() + GIT_SECONDS
    commit = _git(folder, deadline, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    described = _git(folder, deadline, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return described or f"{commit}-unchecked"


def _git(folder: Path, deadline: float, *arguments: str) -> str | None:
    """Return what a git command prints; None where there is no git, it fails, or it has not ended by the deadline."""
    # Variables such as GIT_DIR, which hooks leave, name another repository than the one around the folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                ["git", "-C", str(folder), *arguments],
                stdin=subprocess.DEVNULL,
                # A file, not a pipe: a process that git leaves behind may hold it open.
                stdout=output,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        except (OSError, ValueError):
            return None
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # Git and what it has started: nothing of it may outlive this.
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return output.read().decode(errors="replace").strip() if code == 0 else None
