"""The cost of tracking: step time with all of it and with none, the call that logs, figures, and an outage.

    python -m tests.benchmarks.tracking_cost step      # two loops that take turns of some steps
    python -m tests.benchmarks.tracking_cost log       # the call of the loop, beside an uploader
    python -m tests.benchmarks.tracking_cost figures   # 1,000 classes, 50,000 samples
    python -m tests.benchmarks.tracking_cost outage    # a server on PostgreSQL that is killed and started again

With all of it: a log line every ten steps, gradient norms off as by default, the samples of CPU, memory, disk and network, the
metrics file, and a thread that uploads to MLflow. With none: no log line, no samples, no tracker.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.figures.files import evaluation_files
from resnet_dist.runs.choose import choose_run
from resnet_dist.system.node.usage import NodeUsage
from resnet_dist.tracking.mlflow.publisher import MlflowPublisher
from resnet_dist.tracking.protocol import RunRecord
from resnet_dist.tracking.spool import Spool
from resnet_dist.tracking.store import URI_VARIABLE
from resnet_dist.train import loop, parts
from resnet_dist.train.predictions import Predictions
from resnet_dist.train.tracker import NullTracker, Tracker
from resnet_dist.train.watch.progress import NEXT_BATCH, Progress
from resnet_dist.world import World
from tests.paths import ROOT
from tests.tracking.mlflow.servers import MlflowServer, postgresql_database

TURN_STEPS = 50
NUM_CALLS, NUM_METRICS, CALL_SECONDS = 1_000, 30, 0.05
CLASSES, SAMPLES = 1000, 50_000
WAIT_SECONDS = 10.0  # for the uploads of a turn, before the other loop's turn begins


@dataclass
class Turns(Progress):
    """A Progress that measures turns of TURN_STEPS steps, and lets another loop train between them."""

    num_turns: int
    mine: threading.Semaphore
    other: threading.Semaphore
    before: Callable[[], object] = lambda: None  # called before each turn, outside the measurement
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._begin = 0.0

    def at(self, phase: str, step: int | None = None) -> None:
        super().at(phase, step)
        if phase != NEXT_BATCH or step is None or step % TURN_STEPS:
            return
        if step:
            self.seconds.append(time.perf_counter() - self._begin)
            self.other.release()
        if len(self.seconds) < self.num_turns:
            self.mine.acquire()
            self.before()
            self._begin = time.perf_counter()


def recipe_of(folder: Path, num_turns: int, log_every: int) -> Recipe:
    sets = [f"data.train={folder}/train", f"data.eval={folder}/eval", "train.threads=1", "train.figures=none"]
    sets += [f"train.length={num_turns * TURN_STEPS + 1} steps", f"train.log_every={log_every} steps"]
    sets += ["train.eval_every=0 steps", "train.checkpoint_every=0 steps", "schedule.warmup=0 steps"]
    return load_recipe(ROOT / "jobs/digits.py", sets)


@contextmanager
def tracked(recipe: Recipe, output: Path) -> Iterator[tuple[Tracker, str, MlflowPublisher]]:
    """Yield what rank 0 logs to, the place of its run, and the publisher that a driver has beside it."""
    run = choose_run(output, recipe, "tracked", resume=False)
    run.write()
    publisher = MlflowPublisher(RunRecord(run, recipe, output), lambda entry: None)
    publisher.start()
    with Spool(run.spool) as spool:
        yield spool, run.location, publisher
    publisher.abandon()


def measure_steps(folder: Path, rounds: int) -> None:
    on, off = threading.Semaphore(0), threading.Semaphore(0)
    samples = threading.Event()
    sample = NodeUsage.sample

    def gated(usage: NodeUsage) -> None:
        if samples.is_set():
            sample(usage)

    NodeUsage.sample = gated  # type: ignore[method-assign]
    everything, nothing = recipe_of(folder, rounds, 10), recipe_of(folder, rounds, rounds * TURN_STEPS + 1)
    with tracked(everything, folder) as (spool, place, publisher):

        def quiet() -> None:
            samples.clear()
            deadline = time.monotonic() + WAIT_SECONDS
            while publisher.num_waiting() and time.monotonic() < deadline:
                time.sleep(0.05)

        with_all = Turns(rounds, on, off, samples.set)
        with_none = Turns(rounds, off, on, quiet)
        first = _begin(everything, place, spool, with_all)
        parts.usage_of = lambda world: NodeUsage([])  # type: ignore[attr-defined]
        second = _begin(nothing, str(folder / "bare"), NullTracker(), with_none)
        on.release()
        for thread in (first, second):
            thread.join()
    ratios = [a / b for a, b in zip(with_all.seconds[1:], with_none.seconds[1:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    total = sum(with_all.seconds[1:]) / sum(with_none.seconds[1:])
    print(
        f"{len(ratios)} rounds of {TURN_STEPS} steps; step {statistics.median(with_none.seconds) / TURN_STEPS:.4f} s "
        f"without tracking; with all of it {middle:.4f} × (quartiles {low:.4f} and {high:.4f}; of all seconds {total:.4f})"
    )


def _begin(recipe: Recipe, place: str, tracker: Tracker, turns: Turns) -> threading.Thread:
    """Start a loop, and wait until it is ready for its first turn."""
    thread = threading.Thread(
        target=lambda: loop.train(recipe, place, World.single(), tracker, progress=turns), daemon=True
    )
    thread.start()
    while turns.phase != NEXT_BATCH:
        if not thread.is_alive():
            raise SystemExit("the loop has ended before its first step")
        time.sleep(0.1)
    return thread


def measure_log(folder: Path) -> None:
    metrics = {f"train/metric_{number}": number / 7 for number in range(NUM_METRICS)}
    seconds = []
    with tracked(recipe_of(folder, 1, 10), folder) as (spool, _, _):
        for step in range(NUM_CALLS):
            begin = time.perf_counter()
            spool.log(metrics, step)
            seconds.append(time.perf_counter() - begin)
            time.sleep(CALL_SECONDS)  # More often than a training logs; the uploader has its work beside it.
    middle, late = statistics.median(seconds), np.percentile(seconds, 99)
    print(
        f"{NUM_CALLS:,} calls with {NUM_METRICS} metrics: median {1e3 * middle:.3f} ms, 99th percentile {1e3 * late:.3f} ms"
    )


def measure_figures() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, SAMPLES).astype(np.int32)
    predicted = np.where(rng.random(SAMPLES) < 0.3, rng.integers(0, CLASSES, SAMPLES), labels).astype(
        np.int32
    )
    sure = rng.random(SAMPLES).astype(np.float32)
    worst = np.flatnonzero(labels != predicted)[:36]
    images = rng.integers(0, 255, (len(worst), 224, 224, 3)).astype(np.uint8)
    found = Predictions(np.arange(SAMPLES), labels, predicted, sure, sure / 2, worst, images)
    begin = time.perf_counter()
    files = evaluation_files(found, [f"class {number}" for number in range(CLASSES)], 1)
    seconds = time.perf_counter() - begin
    print(f"{len(files)} files of {CLASSES:,} classes and {SAMPLES:,} samples: {seconds:.1f} s")


def measure_outage(folder: Path, rounds: int) -> None:
    turn = threading.Semaphore(1)
    with postgresql_database() as store:
        server = MlflowServer(folder, store)
        os.environ[URI_VARIABLE] = server.address
        states: list[str] = []

        def change() -> None:
            if len(states) % 2 == 0:
                server.start()
            else:
                server.kill()
            states.append("up" if len(states) % 2 == 0 else "down")

        recipe = recipe_of(folder, 2 * rounds, 10)
        server.start()
        with tracked(recipe, folder) as (spool, place, publisher):
            server.kill()
            turns = Turns(2 * rounds, turn, turn, change)
            loop.train(recipe, place, World.single(), spool, progress=turns)
            server.start()
            publisher.finish(WAIT_SECONDS * 6)
            unsent = publisher.unsent
        server.kill()
    # The first round warms up.
    pairs = list(zip(turns.seconds[::2], turns.seconds[1::2], strict=True))[1:]
    ratios = [down / up for up, down in pairs]
    print(
        f"{len(ratios)} rounds of {TURN_STEPS} steps: {TURN_STEPS / statistics.median(up for up, _ in pairs):.1f} steps/s with "
        f"the server, {TURN_STEPS / statistics.median(down for _, down in pairs):.1f} without it; seconds {statistics.median(ratios):.4f} × "
        f"({min(ratios):.4f} to {max(ratios):.4f}); left afterwards: {', '.join(unsent) or 'nothing'}"
    )


def main() -> None:
    global TURN_STEPS
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["step", "log", "figures", "outage"])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=TURN_STEPS, help="of a turn")
    options = parser.parse_args()
    TURN_STEPS = options.steps
    torch.set_num_threads(1)
    if options.part == "figures":
        measure_figures()
        return
    os.environ.pop(URI_VARIABLE, None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(open_source("digits"), folder)
        if options.part == "step":
            measure_steps(folder, options.rounds)
        elif options.part == "log":
            measure_log(folder)
        else:
            measure_outage(folder, options.rounds)


if __name__ == "__main__":
    main()
