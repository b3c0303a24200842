"""One long run on hosts that share nothing, and a random fault every 20 to 60 s: it ends as the run that nothing struck.

    uv run python tests/benchmarks/soak.py --seconds 1800 --seed 1      # as root, with nginx and PostgreSQL

The undisturbed run comes first and takes a third of the time. The seed decides which fault comes when. Prints a line for each
fault, and the table of docs/restarts.md.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.launch.preload.client import SERVER
from tests.cluster.conftest import data_at
from tests.cluster.hosts import wait_until
from tests.cluster.ray_hosts import RANK, RAYLET
from tests.cluster.results import Result, journal
from tests.cluster.scene import Scene, scene
from tests.cluster.services import MLFLOW_PORT, S3_PORT
from tests.rank_processes import copies
from tests.s3_server import FaultyStore, no_fault

PAUSE_SECONDS = (20.0, 60.0)
STEPS_PER_SECOND = 10.0  # of the undisturbed run, on two cores
OUTAGE_SECONDS = 15.0
LOG = "soak.txt"
FLAGS = [
    # Two ranks always: then the end is bitwise that of the undisturbed run.
    *("--workers=2:2", "--max-restarts=1000", "--wait=600"),
    *("--set=model.name=resnet20", "--set=train.eval_every=200 steps", "--set=train.log_every=2 steps"),
    *("--set=train.checkpoint_every=20 steps", "--set=train.stall_timeout_seconds=30"),
]


@dataclass
class Soak:
    """The scene, the proxies before its servers, and the run under test."""

    scene: Scene
    mlflow: FaultyStore
    s3: FaultyStore
    words: list[str]
    random: random.Random
    process: subprocess.Popen[str] | None = None
    num_submissions: int = 0
    struck: list[tuple[str, float]] = field(default_factory=list)  # fault and time

    def submit(self) -> None:
        variables = {"MLFLOW_TRACKING_URI": self.mlflow.url}
        words = [*self.words, "--env", f"AWS_ENDPOINT_URL={self.s3.url}"]
        self.process = self.scene.submit("soak", *words, log=LOG, variables=variables)
        self.num_submissions += 1

    def node(self) -> int:
        return self.random.randrange(len(self.scene.nodes))

    def rejoin(self, number: int) -> None:
        self.scene.nodes[number].crash()
        self.scene.cluster.join(self.scene.nodes[number])
        self.scene.cluster.wait_for_nodes(*self.scene.nodes)


def kill_rank(soak: Soak) -> None:
    soak.scene.nodes[soak.node()].kill(RANK)


def freeze_rank(soak: Soak) -> None:
    host = soak.scene.nodes[soak.node()]
    for pid in copies(host.find(SERVER)):
        os.kill(pid, signal.SIGSTOP)


def kill_raylet(soak: Soak) -> None:
    number = soak.node()
    soak.scene.nodes[number].kill(RAYLET)
    soak.rejoin(number)


def crash_node(soak: Soak) -> None:
    number = soak.node()
    soak.scene.nodes[number].crash()
    soak.rejoin(number)


def cut_link(soak: Soak) -> None:
    host = soak.scene.nodes[soak.node()]
    host.set_link(up=False)
    time.sleep(5)
    host.set_link(up=True)


def kill_driver(soak: Soak) -> None:
    assert soak.process is not None
    soak.scene.cluster.head.kill("-m resnet_dist train")
    soak.process.wait(300)
    soak.submit()


def take_tracker_away(soak: Soak) -> None:
    with soak.mlflow.away():
        time.sleep(OUTAGE_SECONDS)


def refuse_storage(soak: Soak) -> None:
    soak.s3.fault = lambda method, path: "refuse"
    time.sleep(OUTAGE_SECONDS)
    soak.s3.fault = no_fault


FAULTS: dict[str, Callable[[Soak], None]] = {
    "kill -9 of a rank": kill_rank,
    "a rank that is stopped (SIGSTOP)": freeze_rank,
    "kill -9 of a raylet, then a new one": kill_raylet,
    "power cut of a node, which comes back": crash_node,
    "the link of a node is cut for 5 s": cut_link,
    "kill -9 of the driver, then the same submission": kill_driver,
    "MLflow is away for 15 s": take_tracker_away,
    "the store refuses all requests for 15 s": refuse_storage,
}


def strike(soak: Soak) -> int:
    """Strike until the run has ended; return its last exit code."""
    soak.submit()
    soak.scene.client.wait_for("\nstep 4/", 600, log=LOG)
    while True:
        assert soak.process is not None
        pause, name = soak.random.uniform(*PAUSE_SECONDS), soak.random.choice(list(FAULTS))
        try:
            return soak.process.wait(pause)
        except subprocess.TimeoutExpired:
            pass
        soak.struck.append((name, time.time()))
        try:
            FAULTS[name](soak)
            note = ""
        except AssertionError as error:  # What it would have struck was just being started again.
            soak.struck.pop()
            note = f": {str(error).splitlines()[0]}"
        print(f"{time.strftime('%H:%M:%S')} {name}{note}", flush=True)


@contextmanager
def soaking(words: list[str], seed: int) -> Iterator[Soak]:
    with tempfile.TemporaryDirectory() as folder:
        prepare(open_source("digits"), Path(folder))
        with scene(Path(folder)) as made:
            host_of = {"mlflow": made.mlflow, "s3": made.client.environment["AWS_ENDPOINT_URL"]}
            addresses = {name: url.split("/")[2].partition(":")[0] for name, url in host_of.items()}
            with (
                closing(FaultyStore(MLFLOW_PORT, host=addresses["mlflow"], bind=made.gateway)) as mlflow,
                closing(FaultyStore(S3_PORT, host=addresses["s3"], bind=made.gateway)) as s3,
            ):
                yield Soak(made, mlflow, s3, [*words, *data_at(made.shards)], random.Random(seed))


def next_step_seconds(soak: Soak, name: str) -> list[float]:
    """Return the seconds from each fault of this kind to the first step after it that had not been logged before."""
    entries = [entry for entry in journal(soak.scene.run("soak")) if entry.step is not None and entry.metrics]
    found = []
    for _, struck in [each for each in soak.struck if each[0] == name]:
        before = max((entry.step or 0 for entry in entries if entry.time_ms / 1000 <= struck), default=0)
        after = [entry.time_ms / 1000 for entry in entries if (entry.step or 0) > before]
        found += [min(after) - struck] if after else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    steps = int(options.seconds / 3 * STEPS_PER_SECOND) // 200 * 200
    words = [*FLAGS, f"--set=train.length={max(200, steps)} steps"]
    with soaking(words, options.seed) as soak:
        begin = time.monotonic()
        process = soak.scene.submit("undisturbed", *soak.words, log="undisturbed.txt")
        assert process.wait(3600) == 0, soak.scene.client.output("undisturbed.txt")[-3000:]
        undisturbed = Result.of(soak.scene.mlflow, soak.scene.run("undisturbed"))
        middle = time.monotonic()
        print(f"undisturbed: {max(200, steps)} steps in {middle - begin:.0f} s", flush=True)
        code = strike(soak)
        wait_until(lambda: not soak.scene.rank_processes(), 120, lambda: "a rank has outlived the run")
        result = Result.of(soak.scene.mlflow, soak.scene.run("soak"))
        print("\n| fault | times | seconds to a new step: median | most |\n|---|---|---|---|")
        for name in FAULTS:
            seconds = next_step_seconds(soak, name)
            cells = [f"{statistics.median(seconds):.0f}", f"{max(seconds):.0f}"] if seconds else ["–", "–"]
            times = sum(each[0] == name for each in soak.struck)
            print(f"| {name} | {times} | {' | '.join(cells)} |")
        print(
            f"\nseed {options.seed}, {len(soak.struck)} faults in {time.monotonic() - middle:.0f} s, exit code {code}, "
            f"{result.status}, {soak.num_submissions} submissions, {soak.scene.run('soak').attempt} attempts, points lost "
            f"{result.num_lost(undisturbed)}, doubled {result.num_doubled(undisturbed)}, largest difference "
            f"{result.difference(undisturbed):g}, weights equal: {result.weights == undisturbed.weights}"
        )
        if code != 0:
            print(soak.scene.client.output(LOG)[-5000:])


if __name__ == "__main__":
    main()
