"""A machine whose clock jumps, or whose disk is full under the shard cache or the scratch folder."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.runs.storage.scratch import SCRATCH_VARIABLE
from tests.cluster.results import Result
from tests.data.odd_server import odd_server
from tests.driver.commands import Runner, assert_undisturbed
from tests.s3_server import S3Server

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
# Imported by Python at its start: the time of day jumps once the file is there.
CLOCK = """
import os, time

real, real_ns = time.time, time.time_ns

def jump():
    return {seconds} if os.path.exists({mark!r}) else 0

time.time = lambda: real() + jump()
time.time_ns = lambda: real_ns() + jump() * 10**9
"""


@pytest.fixture
def runner(digits_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    made = Runner(tmp_path, digits_data)
    yield made
    made.close()


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_a_clock_that_jumps_by_an_hour(runner: Runner, undisturbed: Result, seconds: int) -> None:
    mark = runner.folder / "jump"
    (runner.folder / "clock").mkdir()
    (runner.folder / "clock/sitecustomize.py").write_text(CLOCK.format(seconds=seconds, mark=str(mark)))
    before = os.environ.get("PYTHONPATH", "")
    runner.variables["PYTHONPATH"] = f"{runner.folder}/clock{os.pathsep}{before}"
    command = runner.train(str(runner.folder / "output"))
    command.wait_for("\nstep 10/")
    mark.touch()
    code, output = command.end()
    assert code == 0, output
    assert_undisturbed(runner.result(str(runner.folder / "output")), undisturbed)
    assert "ends" not in output  # No rank thinks that its driver is gone.


def small_disk(folder: Path, size: str) -> list[str]:
    """Return a command that starts another one, to which `folder` is a disk of that size. Skips where that needs more rights."""
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    if shutil.which("unshare") is None or os.geteuid() != 0 or tried.returncode != 0:
        pytest.skip("needs root, to mount a small disk")
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs {folder} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", mount, "sh"]


def train_with_cache(runner: Runner, data: Path, size: str) -> tuple[int, str]:
    """Train on served shards with a disk of `size` under the shard cache."""
    folder = runner.folder / "small"
    runner.before = small_disk(folder, size)
    with odd_server(data) as server:
        fields = {f"data.{part}": f"{server.url}/plain/{part}" for part in ("train", "eval")}
        fields |= {"data.shard_cache": f"{folder}/cache", "data.fetch_timeout_seconds": "5"}
        return runner.train(str(runner.folder / "output"), fields=fields).end()


def test_a_shard_cache_on_a_disk_that_holds_some_shards(
    runner: Runner, digits_data: Path, undisturbed: Result
) -> None:
    """The limit of the cache is 200 GiB by default: many disks are smaller."""
    code, output = train_with_cache(runner, digits_data, "1m")
    assert code == 0, output
    assert output.count("its disk is full before data.shard_cache_bytes=") == 1
    assert_undisturbed(runner.result(str(runner.folder / "output")), undisturbed)


def test_a_shard_cache_on_a_disk_that_holds_no_shard(runner: Runner, digits_data: Path) -> None:
    code, output = train_with_cache(runner, digits_data, "200k")
    assert code == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"data.shard_cache={runner.folder}/small/cache: No space left on device" in line
    assert "Traceback" not in output


def test_a_disk_that_is_full_under_the_scratch_folder(
    s3: S3Server, runner: Runner, undisturbed: Result
) -> None:
    """A checkpoint is written there before it is uploaded: training goes on without one, and the end names the cause."""
    folder = runner.folder / "small"
    runner.before = small_disk(folder, "300k")
    runner.variables[SCRATCH_VARIABLE] = str(folder)
    code, output = runner.train(f"s3://{s3.new_bucket()}/output").end()
    assert code == 1, output
    assert "\nstep 48/48" in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert str(folder) in line
    assert "Traceback" not in output
