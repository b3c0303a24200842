"""Limits of a shell and a container: raised where that is allowed, and otherwise one sentence with the command."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from resnet_dist.errors import UserError
from resnet_dist.system.environment import limits
from resnet_dist.system.environment.explain import limit_behind

INFINITY = resource.RLIM_INFINITY


class Shell:
    """The limits of a shell, in place of this process's."""

    def __init__(self) -> None:
        self.limits: dict[int, tuple[int, int]] = {}

    def getrlimit(self, number: int) -> tuple[int, int]:
        return self.limits.get(number, (INFINITY, INFINITY))

    def setrlimit(self, number: int, values: tuple[int, int]) -> None:
        assert values[1] == self.getrlimit(number)[1]  # Only root could raise the hard one.
        self.limits[number] = values


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Shell:
    shell = Shell()
    monkeypatch.setattr(resource, "getrlimit", shell.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", shell.setrlimit)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return shell


@pytest.mark.parametrize(
    ("limit", "value", "num_workers", "sentence"),
    [
        (limits.OPEN_FILES, 64, 2, "`ulimit -n` is 64 open files, and Ray needs 144: type `ulimit -n 4096`"),
        (limits.OPEN_FILES, 256, 64, "`ulimit -n` is 256 open files, and Ray needs 640"),
        (limits.OPEN_FILES, 20, 0, "`ulimit -n` is 20 open files, and training needs 48"),
        (limits.FILE_SIZE, 10 * 1024, 0, "`ulimit -f` is 10 KiB for one file, and training needs 16384"),
        (limits.MEMORY, 2_000_000 * 1024, 0, "`ulimit -v` is 2000000 KiB of addresses"),
        (
            limits.PROCESSES,
            100,
            2,
            "`ulimit -u` is 100 processes and threads of this user, and Ray needs 420",
        ),
    ],
)
def test_a_hard_limit_is_one_sentence(
    limit: limits.Limit, value: int, num_workers: int, sentence: str, shell: Shell
) -> None:
    shell.limits[limit.number] = (value, value)
    with pytest.raises(UserError) as caught:
        limits.check_limits(num_workers)
    assert str(caught.value).startswith(sentence)
    assert ("--local" in str(caught.value)) == (num_workers > 0)


@pytest.mark.parametrize("hard", [4096, INFINITY])
@pytest.mark.parametrize("limit", [limits.OPEN_FILES, limits.PROCESSES])
def test_a_soft_limit_is_raised(limit: limits.Limit, hard: int, shell: Shell) -> None:
    shell.limits[limit.number] = (20, hard)
    assert limits.check_limits(2) == []
    assert shell.limits[limit.number] == (hard, hard)


def test_enough_stays_as_it_is(shell: Shell) -> None:
    shell.limits[limits.OPEN_FILES.number] = (1024, 1_048_576)
    assert limits.check_limits(8) == []
    assert shell.limits[limits.OPEN_FILES.number] == (1024, 1_048_576)


def test_the_processes_of_root_are_not_limited(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.limits[limits.PROCESSES.number] = (10, 10)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert limits.check_limits(2) == []


def test_the_processes_of_a_container(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (group / "pids.current").write_text("5\n")
    (group / "pids.max").write_text("max\n")
    assert limits.check_processes_of_group(2, tmp_path) == []
    (group / "pids.max").write_text("100\n")
    assert limits.check_processes_of_group(0, tmp_path) == []
    with pytest.raises(
        UserError, match=r"may have 100 processes and threads, 5 of .* Ray needs 420 more: .*--local"
    ):
        limits.check_processes_of_group(2, tmp_path)


def test_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "own_folder", lambda: tmp_path)
    monkeypatch.setattr(limits, "SHARED_MEMORY", tmp_path)
    assert limits.shared_memory() == (None, [])
    gone = tmp_path / "shm"
    monkeypatch.setattr(limits, "SHARED_MEMORY", gone)
    assert limits.shared_memory() == (tmp_path, [f"{gone} is missing: Ray's object store uses {tmp_path}"])


@pytest.mark.parametrize(
    ("error", "limit"),
    [
        (OSError(24, "Too many open files"), limits.OPEN_FILES),
        (OSError(27, "File too large"), limits.FILE_SIZE),
        (MemoryError(), limits.MEMORY),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), limits.MEMORY),
        (RuntimeError("can't start new thread"), limits.PROCESSES),
    ],
)
def test_the_limit_behind_an_error(error: Exception, limit: limits.Limit, shell: Shell) -> None:
    outer = ValueError("a checkpoint could not be written")
    outer.__cause__ = error
    assert limit_behind(outer) is None  # without the limit it is something else
    shell.limits[limit.number] = (4096, 4096)
    sentence = limit_behind(outer)
    assert sentence is not None
    assert f"`ulimit {limit.option}` is {4096 // limit.unit} " in sentence
    assert sentence.endswith(f"type `ulimit {limit.option} {limit.advice}` and the same command")


def test_other_errors_have_no_limit_behind_them(shell: Shell) -> None:
    for limit in limits.LIMITS:
        shell.limits[limit.number] = (4096, 4096)
    assert limit_behind(KeyError("x")) is None
    assert limit_behind(FileNotFoundError(2, "No such file")) is None


def test_errors_that_are_each_others_cause_come_to_an_end(shell: Shell) -> None:
    error, other = KeyError("x"), KeyError("y")
    error.__cause__, other.__cause__ = other, error
    assert limit_behind(error) is None
