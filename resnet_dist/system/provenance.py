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
from dataclasses import dataclass
from pathlib import Path

GIT_COMMIT_VARIABLE = "RESNET_DIST_GIT_COMMIT"
SOURCE_VARIABLE = "RESNET_DIST_SOURCE"
USER_VARIABLE = "RESNET_DIST_USER"
GIT_BRANCH_VARIABLE = "RESNET_DIST_GIT_BRANCH"
CHANGES_VARIABLE = "RESNET_DIST_CHANGES"  # what the command changed of its recipe file
MAX_DIFF_BYTES = 200_000
GIT_SECONDS = 0.8  # for all of git: no run waits longer for its origin
_UNREAD = f"not read: git fails, or takes longer than {GIT_SECONDS:g} s"


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
    return _commit(folder, time.monotonic() + GIT_SECONDS)


@dataclass(frozen=True)
class GitState:
    """The state of a repository: the commit as `git_commit` returns it, the branch, and what differs from the commit."""

    commit: str
    branch: str = ""  # empty: none, or it is not known
    diff: str = ""  # at most MAX_DIFF_BYTES of it
    no_diff: str = ""  # why there is none, though files differ or may differ

    @property
    def is_dirty(self) -> bool:
        return self.commit.endswith("-dirty")


def git_state(folder: Path) -> GitState | None:
    """Return the state of the repository around `folder`; None where `git_commit` returns None."""
    deadline = time.monotonic() + GIT_SECONDS
    commit = _commit(folder, deadline)
    if commit is None:
        return None
    branch = _git(folder, deadline, "symbolic-ref", "--short", "--quiet", "HEAD") or ""
    if not commit.endswith("-dirty"):
        return GitState(commit, branch, no_diff=_UNREAD if commit.endswith("-unchecked") else "")
    # No program that the person has configured for diffs is run.
    plain = ("--no-color", "--no-ext-diff", "--no-textconv")
    diff = _git(folder, deadline, "diff", *plain, "HEAD")
    if diff is None:
        return GitState(commit, branch, no_diff=_UNREAD)
    cut = len(diff.encode()) >= MAX_DIFF_BYTES - 1
    return GitState(commit, branch, f"{diff}\n… cut after {MAX_DIFF_BYTES:,} bytes" if cut else diff)


def _commit(folder: Path, deadline: float) -> str | None:
    commit = _git(folder, deadline, "rev-parse", "--verify", "HEAD")
    if not commit:
        return None
    described = _git(folder, deadline, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return described or f"{commit}-unchecked"


def _git(folder: Path, deadline: float, *arguments: str) -> str | None:
    """Return the beginning of what a git command prints, at most MAX_DIFF_BYTES.

    None where there is no git, it fails, or it has not ended by the deadline.
    """
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
        return output.read(MAX_DIFF_BYTES).decode(errors="replace").strip() if code == 0 else None
