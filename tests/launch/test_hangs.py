"""Whole runs in which a rank is stopped, hangs or is slow: it is named while the run goes on, and the result is the same."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Loader
from resnet_dist.launch.attempt import Attempt
from resnet_dist.launch.rank import run_attempt
from resnet_dist.runs.folder import token_name
from resnet_dist.runs.stalls import STALLS_FOLDER
from resnet_dist.runs.storage.open import open_storage
from resnet_dist.train.checkpoint.folder import read_checkpoint
from resnet_dist.world import World
from tests.launch.test_torchrun import DIGITS, SHORT, run, start
from tests.paths import list_checkpoints
from tests.train.ranks import run_ranks

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
HOST = re.escape(platform.node())
# Reported after half of it; a first pass through a phase has three times as long.
TIMEOUT = ["--set", "train.stall_timeout_seconds=30"]

# Rank {rank} writes the number of its process, and stops itself at a batch in the middle of the run.
STOP = """
if os.environ.get("RANK") == "{rank}":
    from resnet_dist.data.batches.loader import Loader
    batch_at = Loader.batch_at
    def stop(self, step):
        if step == 14 and self.order.training:
            with open("stopped", "w") as file:
                file.write(str(os.getpid()))
            os.kill(os.getpid(), 19)
        return batch_at(self, step)
    Loader.batch_at = stop
"""


@pytest.fixture
def folder(tmp_path: Path, digits_data: Path) -> Path:
    shutil.copytree(digits_data, tmp_path / "output/data/digits")
    return tmp_path


def weights(folder: Path, name: str) -> Any:
    (*_, last) = list_checkpoints(folder / f"output/runs/{name}/checkpoints")
    return read_checkpoint(last)[1]["sha256"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped_is_named_and_continues(folder: Path, rank: int) -> None:
    """Under torchrun rank 0 is the driver too: where it is stopped, another rank shows the line."""
    command = ("train", DIGITS, "--name", "x", *SHORT, *TIMEOUT)
    process = start(folder, *command, sabotage=STOP.format(rank=rank))
    stream = process.stdout if rank else process.stderr
    assert stream is not None
    text = ""
    # It was seen last up to a poll before it stopped; not at all where its process has the store.
    where = rf"(last seen at step \d+, .*, )?while rank {1 - rank} is at step 14, in the backward pass"
    pattern = rf"rank {rank} on {HOST} has not answered for \d+ s, {where} .*: stopped, or cut off"
    while not re.search(pattern, text):
        line = stream.readline()
        assert line, (text, process.communicate())
        text += line
    os.kill(int((folder / "stopped").read_text()), signal.SIGCONT)
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, (out, err)
    ends = re.findall(rf"rank {rank} on {HOST} moves again, after \d+ s without progress at step 14", out)
    assert len(ends) == 1, (out, err)
    stacks = sorted((folder / f"output/runs/x/{STALLS_FOLDER}").glob("*-begin.txt"))
    assert len(stacks) == 1
    assert f"rank {rank} on" in stacks[0].read_text()
    code, _, err = run(folder, "train", DIGITS, "--name", "whole", *SHORT)
    assert code == 0, err
    assert weights(folder, "x") == weights(folder, "whole")


SLOW = """
if "RANK" in os.environ:
    from resnet_dist.train.watch import stragglers
    stragglers.SLOW_SECONDS = 2.0
if os.environ.get("RANK") == "1":
    import time
    from resnet_dist.data.shards.reader import ShardReader
    read_at = ShardReader.read_at
    def slow_read(self, number, position):
        time.sleep(0.01)
        return read_at(self, number, position)
    ShardReader.read_at = slow_read
"""


def test_a_rank_whose_storage_is_slow_is_named(folder: Path) -> None:
    flags = ["--set", "data.cache=none", "--set", "train.log_every=4 steps"]
    code, out, err = run(folder, "train", DIGITS, "--name", "x", *SHORT, *flags, sabotage=SLOW)
    assert code == 0, err
    slow = re.findall(rf"rank (\d) on {HOST} is slow: .* most of the difference waiting for data", out)
    assert slow == ["1"], out
    code, _, err = run(folder, "train", DIGITS, "--name", "whole", *SHORT, *flags)
    assert code == 0, err
    assert weights(folder, "x") == weights(folder, "whole")


def stop_the_store(world: World, recipe_json: str, folder: str) -> str:
    """Train; at step 6 rank 1 stops rank 0, whose process has the store, until the stall is reported."""
    storage, batch_at = open_storage(folder), Loader.batch_at
    (pid, _) = world.gather(os.getpid())

    def continue_when_reported() -> None:
        pause = threading.Event()
        while not storage.objects(STALLS_FOLDER):
            pause.wait(0.2)
        os.kill(pid, signal.SIGCONT)

    def stop(self: Loader, step: int) -> object:
        if step == 6 and world.rank == 1 and self.order.training:
            os.kill(pid, signal.SIGSTOP)
            threading.Thread(target=continue_when_reported, daemon=True).start()
        return batch_at(self, step)

    Loader.batch_at = stop  # type: ignore[assignment,method-assign]
    storage.write(token_name("t"), b"")
    outcome = run_attempt(Attempt(recipe_json, folder, cpus=1, number=1, token="t", host="here"), world)
    return "finished" if outcome is not None and outcome.finished else "not finished"


def test_rank_0_is_named_where_the_store_has_stopped_with_it(digits_recipe: Recipe, tmp_path: Path) -> None:
    recipe = digits_recipe.with_overrides(["train.stall_timeout_seconds=40"])
    results = run_ranks(2, stop_the_store, recipe.to_json(), str(tmp_path))
    assert results == ["finished", "finished"]
    begin, end = open_storage(tmp_path).objects(STALLS_FOLDER)
    assert begin.name.endswith("-rank-0-begin.txt")
    assert end.name == begin.name.replace("begin", "end")
    line = (tmp_path / begin.name).read_text().splitlines()[0]
    assert re.match(rf"rank 0 on {HOST} has not answered for \d+ s", line)
    assert "moves again" in (tmp_path / end.name).read_text()
