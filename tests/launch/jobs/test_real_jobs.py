"""The life of jobs on a small real cluster: submitted, listed, followed, stopped, resumed, killed, forgotten."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.launch.jobs.real_head import SECONDS, Head, descendants, read_until, small_head
from tests.paths import ROOT

FLAGS = (
    "--workers=1",
    "--set=train.checkpoint_every=10 steps",
    "--set=model.name=resnet8",
    "--set=train.length=20000 steps",
)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    with small_head(tmp_path) as made:
        yield made


RECIPE = """
from beside import DATA
from digits import recipe as digits

def recipe():
    return digits().with_overrides([f"data.{split}={DATA}/{split}" for split in ("train", "eval")])
"""


@pytest.fixture
def mine(head: Head, digits_data: Path) -> Path:
    """A folder with a recipe, a module that it imports, and the shards that it names."""
    folder = head.folder / "mine"
    shutil.copytree(digits_data, folder / "data")
    shutil.copy(ROOT / "jobs/digits.py", folder)
    (folder / "recipe.py").write_text(RECIPE)
    (folder / "beside.py").write_text("DATA = 'mine/data'")
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_life_of_jobs(head: Head, mine: Path) -> None:
    with head.running() as ray:
        submit = ("submit", str(mine / "recipe.py"), "--output", str(head.folder / "output"), *FLAGS)
        sent = ("--working-dir", str(mine), "--env", "MY_TOKEN=hush")
        code, printed = head.run(*submit, *sent, "--name", "first", "--detach")
        assert code == 0, printed
        assert "--env MY_TOKEN: Ray stores" in printed
        assert f" of {mine}" in printed
        assert f"  resnet-dist stop first --address {head.url}\n" in printed
        follower = head.start("logs", "first", "--follow")
        assert read_until(follower, "step 30/20000").startswith("run first: ")

        code, printed = head.run("jobs", "--json")
        (job,) = json.loads(printed)["jobs"]
        assert (code, job["run"], job["state"], job["total_steps"]) == (0, "first", "RUNNING", 20000)
        assert "hush" not in printed

        code, printed = head.run("stop", "first")
        assert code == 0, printed
        saved = printed.partition("saved step ")[2].split()[0]
        checkpoint = head.folder / f"output/runs/first/checkpoints/step-{int(saved):08d}"
        assert str(checkpoint) in printed
        assert checkpoint.is_dir()
        rest, _ = follower.communicate(timeout=SECONDS)
        assert follower.returncode == 130
        assert "was stopped by another command" in rest
        assert "Traceback" not in rest

        # The line that resumes names the variable without its value. Then the driver is killed.
        resume = [word for word in shlex.split(printed.splitlines()[-1]) if word != "--detach"]
        assert "MY_TOKEN" in resume
        head.variables["MY_TOKEN"] = "hush"
        client = head.start(*resume[1:])
        read_until(client, f"resumed at step {saved} of 20000")
        for pid in descendants(ray.pid, "-m resnet_dist train"):
            os.kill(pid, signal.SIGKILL)
        rest, _ = client.communicate(timeout=SECONDS)
        assert client.returncode == 1
        assert "the driver of run first was killed (SIGKILL" in rest
        assert head.run("status", "first")[0] == 1

        client = head.start(*submit, "--name", "second")
        read_until(client, "run second: ")
        for pid in descendants(ray.pid, ""):  # as a power cut ends them
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with head.running():
        rest, _ = client.communicate(timeout=SECONDS)
        assert client.returncode == 1, rest
        assert "its head was restarted, and has forgotten its jobs" in rest
        assert rest.rstrip().endswith("--name second")
