"""The commit of a run: found where there is one, and never an error or a wait."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from resnet_dist.system import provenance
from resnet_dist.system.provenance import git_commit, git_state
from tests.cluster.hosts import wait_until
from tests.paths import ROOT

LIMIT_SECONDS = 5.0  # An upper limit for a busy machine; a git that hangs would take ten minutes.


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.email=a@b.c", "-c", "user.name=a", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a repository with one commit of one file."""
    monkeypatch.setattr(provenance, "GIT_SECONDS", LIMIT_SECONDS)
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / "recipe.py").write_text("1")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    return folder


def fake_git(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_commit_and_whether_files_differ(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    assert git_commit(repository) == commit
    (repository / "recipe.py").write_text("2")
    assert git_commit(repository) == f"{commit}-dirty"


def test_the_branch_and_what_differs(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(repository, "checkout", "-qb", "feature/x")
    clean = git_state(repository)
    assert clean is not None
    assert (clean.branch, clean.diff, clean.is_dirty) == ("feature/x", "", False)
    # A program that the person has configured for diffs is not run.
    git(repository, "config", "diff.external", f"touch {repository}/ran; false")
    (repository / "recipe.py").write_text("2" * 5000)
    monkeypatch.setattr(provenance, "MAX_DIFF_BYTES", 1000)
    dirty = git_state(repository)
    assert dirty is not None
    assert dirty.is_dirty
    assert "+2222" in dirty.diff
    assert dirty.diff.endswith("\n… cut after 1,000 bytes")
    assert len(dirty.diff) < 1100
    assert not (repository / "ran").exists()
    git(repository, "checkout", "-q", "--detach")
    detached = git_state(repository)
    assert detached is not None
    assert detached.branch == ""


def test_a_variable_of_another_repository_counts_for_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git_commit(repository)
    monkeypatch.setenv("GIT_DIR", str(ROOT / "nowhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", "/nowhere/index")
    assert git_commit(repository) == commit is not None


def test_a_lock_of_another_git_holds_nothing_up(repository: Path) -> None:
    commit = git_commit(repository)
    (repository / ".git/index.lock").touch()
    (repository / ".git/HEAD.lock").touch()
    assert git_commit(repository) == commit is not None


def test_places_without_a_commit(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "-q")
    assert git_commit(empty) is None
    git(tmp_path, "init", "-q", "--bare", "bare")
    assert git_commit(tmp_path / "bare") is None
    assert git_commit(tmp_path / "gone") is None
    monkeypatch.setenv("PATH", str(empty))
    assert git_commit(repository) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to somebody else")
def test_a_repository_of_somebody_else(repository: Path) -> None:
    for path in [repository, *repository.rglob("*")]:
        os.chown(path, 12345, 12345)
    assert git_commit(repository) is None


@pytest.mark.parametrize(
    "script", ["exec sleep 600", "sleep 600 & wait", "trap '' TERM INT; sleep 600; sleep 600"]
)
def test_a_git_that_hangs_is_ended_with_all_that_it_started(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_git(tmp_path / "bin", monkeypatch, f"echo $$ > {tmp_path}/pid\n{script}")
    start = time.monotonic()
    assert git_commit(tmp_path) is None
    assert time.monotonic() - start < LIMIT_SECONDS
    group = int((tmp_path / "pid").read_text())
    # A busy machine takes a moment to end what was killed.
    wait_until(lambda: not alive_in(group), 30, lambda: f"{alive_in(group)} of the group {group}")


def alive_in(group: int) -> list[str]:
    """Return the states of the processes of a group, but for those that have ended."""
    ps = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True, check=False)
    return [state for state in ps.stdout.split() if not state.startswith("Z")]


def test_a_repository_too_large_to_compare_gives_its_commit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    monkeypatch.setattr(provenance, "GIT_SECONDS", 0.8)
    fake_git(tmp_path / "bin", monkeypatch, f'case "$*" in *describe*) sleep 600;; *) echo {commit};; esac')
    assert git_commit(repository) == f"{commit}-unchecked"


def test_changes_that_could_not_be_read_are_named(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repository / "recipe.py").write_text("2")
    real, commands = provenance._git, list[str]()

    def slow_diff(folder: Path, deadline: float, *arguments: str) -> str | None:
        commands.append(arguments[0])
        return None if arguments[0] == "diff" else real(folder, deadline, *arguments)

    monkeypatch.setattr(provenance, "_git", slow_diff)
    found = git_state(repository)
    assert found is not None
    assert commands[-1] == "diff"
    assert (found.is_dirty, found.diff) == (True, "")
    assert found.no_diff.startswith("not read: git fails, or takes longer than ")
    monkeypatch.setattr(provenance, "_git", real)
    read = git_state(repository)
    assert read is not None
    assert (read.no_diff, "+2" in read.diff) == ("", True)
