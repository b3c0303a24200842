"""A lock is held by one process, on file systems without flock too, and is free again when its process dies."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist.system.locks import LockHeld, has_flock, hold_lock, lock_of, own_folder
from tests.paths import ROOT

NO_FLOCK = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]


def without_flock(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(code, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_a_second_holder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with hold_lock(path, 0), pytest.raises(LockHeld) as held, hold_lock(path, 0):
        pass
    assert held.value.marker is None
    with hold_lock(path, 0):
        pass


@pytest.mark.parametrize("code", NO_FLOCK, ids=errno.errorcode.get)
def test_a_second_holder_is_refused_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    without_flock(monkeypatch, code)
    path = tmp_path / "lock"
    assert not has_flock(path)
    with hold_lock(path, 0), pytest.raises(LockHeld) as held, hold_lock(path, 0):
        pass
    assert held.value.marker == tmp_path / "lock.held"
    assert not held.value.marker.exists()  # It was released.
    with hold_lock(path, 0):
        pass


DIES = """
import errno, fcntl, os, sys
from pathlib import Path
from resnet_dist.system.locks import hold_lock

def flock(*arguments):
    raise OSError(errno.ENOLCK, "no locks here")

fcntl.flock = flock
lock = hold_lock(Path(sys.argv[1]), 0)
lock.__enter__()
os._exit(9)
"""


def test_the_lock_of_a_dead_process_is_taken_over_without_flock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    done = subprocess.run([sys.executable, "-c", DIES, str(path)], cwd=ROOT, timeout=100, check=False)
    assert done.returncode == 9
    assert path.with_name("lock.held").exists()
    without_flock(monkeypatch, errno.ENOLCK)
    with hold_lock(path, 0):
        pass


DIES_IN_ITS_FOLDER = """
import os, sys
from pathlib import Path
from resnet_dist.system.locks import own_folder

owned = own_folder(Path(sys.argv[1]))
folder = owned.__enter__()
folder.mkdir()
(folder / "marker").touch()
os._exit(9)
"""


def test_a_folder_without_a_lock_is_kept_and_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An earlier version locked none, and may be at work in it."""
    old, cannot_go = tmp_path / "of-an-earlier-version", tmp_path / "a-file"
    old.mkdir()
    (old / "tuner.pkl").touch()
    for path in (cannot_go, lock_of(cannot_go), tmp_path / "notes.txt", lock_of(tmp_path / "died-early")):
        path.touch()
    for name in "ab":
        with own_folder(tmp_path / name) as folder:
            folder.mkdir()
            assert (old / "tuner.pkl").exists()
    (record,) = caplog.records
    assert f"{tmp_path}: keeps 1 folder(s) without a lock" in record.getMessage()
    assert "of-an-earlier-version; delete" in record.getMessage()
    # What could not be removed keeps its lock, and the next one tries again.
    left = {"of-an-earlier-version", "a-file", "a-file.lock", "notes.txt"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_a_folder_goes_with_its_process_or_when_the_next_one_begins(tmp_path: Path) -> None:
    dead = tmp_path / "deep/dead"
    command = [sys.executable, "-c", DIES_IN_ITS_FOLDER, str(dead)]
    assert subprocess.run(command, cwd=ROOT, timeout=100, check=False).returncode == 9
    assert (dead / "marker").exists()
    with own_folder(dead.with_name("a")) as first:
        first.mkdir()
        with own_folder(dead.with_name("b")) as second:
            second.mkdir()
            assert sorted(path.name for path in dead.parent.iterdir()) == ["a", "a.lock", "b", "b.lock"]
        assert sorted(path.name for path in dead.parent.iterdir()) == ["a", "a.lock"]
    assert list(dead.parent.iterdir()) == []
