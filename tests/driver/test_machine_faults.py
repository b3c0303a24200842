"""A machine whose clock jumps, or whose disk is full under the shard cache or the scratch folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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


FETCH = """
import sys, time
from pathlib import Path
from resnet_dist.data.shards.index import read_index
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.data.storage.shard_cache import ShardCache

index = read_index(sys.argv[1])
cache = ShardCache(CacheLimits(Path(sys.argv[2]), 2**30, 20.0))
for shard in index.shards:
    print(cache.path(shard).stat().st_size, flush=True)
cache.close()
print("kept", len(list(Path(sys.argv[2]).glob("*/*.tar"))), "of", len(index.shards))
"""


def test_a_shard_cache_on_a_disk_that_holds_some_shards(tmp_path: Path, digits_data: Path) -> None:
    """The limit of the cache is 200 GiB by default: many disks are smaller."""
    folder = tmp_path / "small"
    with odd_server(digits_data) as server:
        command = [sys.executable, "-c", FETCH, f"{server.url}/plain/train", f"{folder}/cache"]
        done = subprocess.run(
            [*small_disk(folder, "1m"), *command],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    sizes = [int(line) for line in done.stdout.splitlines()[:-1]]
    assert sum(sizes) > 2**20
    assert done.stdout.splitlines()[-1] in ("kept 1 of 8", "kept 2 of 8")
    assert done.stderr.count("its disk is full before data.shard_cache_bytes=1,073,741,824 are reached") == 1


def test_a_shard_cache_on_a_disk_that_holds_no_shard(runner: Runner, digits_data: Path) -> None:
    folder = runner.folder / "small"
    runner.before = small_disk(folder, "200k")
    with odd_server(digits_data) as server:
        fields = {f"data.{part}": f"{server.url}/plain/{part}" for part in ("train", "eval")}
        fields |= {"data.shard_cache": f"{folder}/cache", "data.fetch_timeout_seconds": "5"}
        code, output = runner.train(str(runner.folder / "output"), fields=fields).end()
    assert code == 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"data.shard_cache={folder}/cache: No space left on device" in line
    assert "Traceback" not in output


def test_a_disk_that_is_full_under_the_scratch_folder(s3: S3Server, runner: Runner) -> None:
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
