"""Workers on Ray: each part once, also where a worker is killed; an evaluation in shares is that of one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resnet_dist.errors import RankFailed, StorageError, UserError
from resnet_dist.launch.on_ray import counts, pool
from resnet_dist.launch.on_ray.placement.fit import Placement
from tests.checkpoints import random_checkpoint


def test_workers_without_room_are_reported_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = iter([0.0, 1.0, 61.0, 62.0, 601.0]), list[str]()
    actor = SimpleNamespace(ready=SimpleNamespace(remote=lambda: "call"))
    monkeypatch.setattr(pool.ray, "wait", lambda left, num_returns, timeout: ([], left))
    monkeypatch.setattr(pool, "free_and_held", lambda: "1 of 2 CPUs are free")
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with pytest.raises(RankFailed) as failure:
        pool._wait_until_ready([actor, actor], Placement(2, 1, gpu=False), lines.append)
    assert str(failure.value) == (
        "2 of 2 workers, with 1 CPU(s) each, have not started in 601 s; 1 of 2 CPUs are free"
    )
    # They may hold places, and be starting.
    sentence = "waiting for workers, 600 s at most: 2 of 2, with 1 CPU(s) each, have not started; 1 of 2 CPUs are free"
    assert lines == [sentence]


def test_a_storage_that_one_node_lacks_is_named_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(job: Any, part: Any, cpus: int) -> None:
        raise StorageError("/data: no such folder")

    monkeypatch.setattr(pool.ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    with pytest.raises(StorageError, match=r"^worker on 10.0.0.7: /data: no such folder$"):
        pool.Worker().call(refuse, None, None, torch.get_num_threads())


def test_counts_are_written_now_and_then_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    head: dict[bytes, bytes] = {}
    client = SimpleNamespace(
        internal_kv_multi_get=lambda keys, namespace: {key: head[key] for key in keys if key in head}
    )

    def put(key: bytes, value: str, *, namespace: bytes) -> None:
        head[key] = value.encode()

    def delete(prefix: str, *, del_by_prefix: bool, namespace: bytes) -> None:
        for key in [key for key in head if key.decode().startswith(prefix)]:
            del head[key]

    fake = SimpleNamespace(
        internal_kv_get_gcs_client=lambda: client, _internal_kv_put=put, _internal_kv_del=delete
    )
    now = [100.0]
    monkeypatch.setattr(counts, "internal_kv", fake)
    monkeypatch.setattr(counts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made = counts.Counts(3)
    first, second, _ = made.of_workers
    first(2)
    first(3)  # This soon after the last one, it is not written.
    second(5)
    assert made.total() == 7
    now[0] += 1.0
    first(4)
    assert made.total() == 9
    monkeypatch.setattr(fake, "_internal_kv_put", None)  # A head that does not answer ends no evaluation.
    now[0] += 1.0
    first(6)
    assert made.total() == 9
    made.close()
    assert head == {}


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

        def count_up(job: dict[str, str], part: int, cpus: int, count: Callable[[int], None]) -> int:
            count(part)
            while not Path(job["folder"], "seen").exists():
                time.sleep(0.05)
            return part

        def show(total: int) -> None:
            if total == 9:
                (tmp_path / "seen").touch()

        count_up.__module__ = "__main__"
        assert workers.map(count_up, job, [4, 5], show) == [4, 5]
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
