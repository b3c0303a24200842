"""Workers on Ray: each part once, also where a worker is killed; an evaluation in shares is that of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resnet_dist.errors import RankFailed, StorageError, UserError
from resnet_dist.launch.on_ray import pool
from tests.checkpoints import random_checkpoint


def test_workers_without_room_are_reported_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = iter([0.0, 1.0, 61.0, 62.0, 601.0]), list[str]()
    actor = SimpleNamespace(ready=SimpleNamespace(remote=lambda: "call"))
    monkeypatch.setattr(pool.ray, "wait", lambda left, num_returns, timeout: ([], left))
    monkeypatch.setattr(pool, "free_resources", lambda: "1 CPUs and 0 GPUs")
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(RankFailed, match="no room for 2 of 2 workers in 601 s; 1 CPUs and 0 GPUs are free"):
        pool._wait_until_ready([actor, actor], lines.append)
    (line,) = lines
    assert line.startswith("waiting for room, 600 s at most: 2 of 2 workers have no place; ")


def test_a_storage_that_one_node_lacks_is_named_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: Any, part: Any, cpus: int) -> None:
        raise StorageError("/data: no such folder")

    monkeypatch.setattr(pool.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    with pytest.raises(StorageError, match=r"^worker on 10.0.0.7: /data: no such folder$"):
        pool.Worker().call(refuse, None, None, torch.get_num_threads())


@pytest.mark.long
def test_a_worker_that_is_killed_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def square(job: dict[str, str], part: int, cpus: int) -> int:
        marker = Path(job["folder"]) / str(part)
        if part == 3 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if part == 5:
            raise UserError("five is refused")
        return part**2

    # Ray's processes cannot import this module: send functions as values.
    square.__module__ = "__main__"
    job: Any = {"folder": str(tmp_path)}
    with pool.worker_pool(2, gpu=False, address=None, report=lambda text: None) as workers:
        assert workers.map(square, job, [2, 3]) == [4, 9]
        with pytest.raises(UserError, match="^five is refused$"):
            workers.map(square, job, [5])
    assert (tmp_path / "3").exists()


@pytest.mark.long
def test_three_workers_evaluate_as_one_process_does(digits_data: Path, tmp_path: Path) -> None:
    folder, _ = random_checkpoint(tmp_path / "m", "model.name=resnet8", classes=tuple("0123456789"))
    words = [sys.executable, "-m", "resnet_dist", "evaluate", str(folder), str(digits_data / "eval"), "--cpu"]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "OMP_NUM_THREADS": "1",
    }
    printed = []
    for more in (["--out", "one"], ["--out", "three", "--workers", "3"]):
        done = subprocess.run(
            [*words, *more],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.rpartition("written")[0])
    assert printed[0] == printed[1]
    assert "eval/samples  360\n" in printed[0]
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes(), path.name
