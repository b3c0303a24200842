"""The scratch folder of a machine: nothing stays in it of processes that died, and what is in use stays."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from resnet_dist.runs.storage.scratch import (
    LOG_SECONDS,
    RECENT_SECONDS,
    SCRATCH_VARIABLE,
    fetched_folder,
    log_folder,
    scratch_folder,
    written_folder,
)
from resnet_dist.system.locks import lock_of


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(SCRATCH_VARIABLE, str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def filled(folder: Path, age_seconds: float = 0.0) -> Path:
    """Make a folder with a file, and its lock, as a process leaves them that is killed."""
    folder.mkdir(parents=True)
    (folder / "model").write_bytes(b"x")
    lock_of(folder).touch()
    os.utime(folder, (time.time() - age_seconds,) * 2)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_stays_of_a_writer_that_was_killed(scratch: Path) -> None:
    writing = scratch / "writing"
    filled(writing / "dead")
    lock_of(writing / "killed-before-its-folder").touch()
    living = filled(writing / "living")
    with FileLock(lock_of(living)):
        with written_folder() as folder:
            assert names(writing) == sorted([folder.name, f"{folder.name}.lock", "living", "living.lock"])
        assert names(writing) == ["living", "living.lock"]
    with written_folder():
        pass
    assert names(writing) == []


def test_what_was_fetched_goes_with_its_lock(scratch: Path) -> None:
    run = scratch / "fetched/run"
    filled(run / "step-1", RECENT_SECONDS + 60)
    filled(run / "step-2")
    lock_of(run / "step-3").touch()  # Its folder was removed earlier.
    begun = lock_of(run / "step-4")  # The folder is made once the lock is held.
    with FileLock(begun):
        fetched_folder("run", "step-5")
        assert names(run) == ["step-2", "step-2.lock", "step-4.lock"]


def test_what_was_fetched_goes_where_locks_end_with_their_use(scratch: Path) -> None:
    """So they do on file systems without flock, where a lock is a file that exists while it is held."""
    run = scratch / "fetched" / ("f" * 16)
    for name, age_seconds in (("old", RECENT_SECONDS + 60), ("recent", 0.0), ("in-use", RECENT_SECONDS + 60)):
        filled(run / name, age_seconds)
        lock_of(run / name).unlink()
    with FileLock(lock_of(run / "in-use")):
        fetched_folder("0" * 16, "step-1")
        assert names(run) == ["in-use", "in-use.lock", "recent"]


def test_a_user_without_a_home_folder_has_one_among_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (SCRATCH_VARIABLE, "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # So it does where the user is unknown, too.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert scratch_folder() == tmp_path / f"resnet-dist-{os.getuid()}"
    assert names(tmp_path) == [f"resnet-dist-{os.getuid()}"]


def test_what_a_person_keeps_there_stays(scratch: Path) -> None:
    """RESNET_DIST_SCRATCH may name a folder that is used for more."""
    for name in ("fetched/data/photos", "logs/of-another-program", "logs/0123456789abcdef"):
        folder = scratch / name
        filled(folder, LOG_SECONDS + RECENT_SECONDS)
        lock_of(folder).unlink()
    fetched_folder("run", "step-1")
    log_folder("f" * 16)
    assert names(scratch / "fetched/data") == ["photos"]
    assert names(scratch / "logs") == ["f" * 16, "of-another-program"]
