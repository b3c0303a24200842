"""The cost of tracking: step time with all of it and with none, the call that logs, figures, and an outage.

    python -m tests.benchmarks.tracking_cost step      # two loops that take turns of some steps
    python -m tests.benchmarks.tracking_cost log       # the call of the loop, beside an uploader
    python -m tests.benchmarks.tracking_cost figures   # 1,000 classes, 50,000 samples
    python -m tests.benchmarks.tracking_cost outage    # a server on PostgreSQL that is killed for a while, and one that is never there

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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import mlflow
import numpy as np
import torch

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.split import prepare
from resnet_dist.figures.files import evaluation_files
from resnet_dist.runs.choose import choose_run
from resnet_dist.system.memory import collect_rarely
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
from tests.tracking.mlflow.servers import MlflowServer, postgresql_database, unused_address

TURN_STEPS, LOG_EVERY = 50, 10
THREADS = ("upload", "spool", "usage")  # that tracking has beside the loop
NUM_CALLS, NUM_METRICS, CALL_SECONDS = 1_000, 30, 0.05
CLASSES, SAMPLES = 1000, 50_000
WAIT_SECONDS = 60.0  # for the uploads of an outage, after the training


@dataclass
class Turns(Progress):
    """A Progress that measures turns of TURN_STEPS steps, and lets another loop train between them."""

    num_turns: int
    mine: threading.Semaphore
    other: threading.Semaphore
    before: Callable[[], object] = lambda: None  # called before each turn, outside the measurement
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)  # of the loop's thread

    def __post_init__(self) -> None:
        super().__init__()
        self._begin = self._begin_cpu = 0.0

    def at(self, phase: str, step: int | None = None) -> None:
        super().at(phase, step)
        if phase != NEXT_BATCH or step is None or step % TURN_STEPS:
            return
        if step:
            self.seconds.append(time.perf_counter() - self._begin)
            self.cpu_seconds.append(time.thread_time() - self._begin_cpu)
            self.other.release()
        if len(self.seconds) < self.num_turns:
            self.mine.acquire()
            self.before()
            self._begin, self._begin_cpu = time.perf_counter(), time.thread_time()


def cpu_seconds_of(name: str) -> float:
    """Return the CPU seconds of the threads of this name."""
    clocks = [
        time.pthread_getcpuclockid(one.ident)
        for one in threading.enumerate()
        if one.name == name and one.ident
    ]
    return sum(map(time.clock_gettime, clocks))


def sample_where(may_sample: Callable[[], bool]) -> None:
    """Let machines be sampled only while `may_sample` returns True."""
    sample = NodeUsage.sample

    def gated(usage: NodeUsage) -> None:
        if may_sample():
            sample(usage)

    NodeUsage.sample = gated  # type: ignore[method-assign]


def recipe_of(folder: Path, num_turns: int, log_every: int) -> Recipe:
    sets = [f"data.train={folder}/train", f"data.eval={folder}/eval", "train.threads=1", "train.figures=none"]
    sets += [f"train.length={num_turns * TURN_STEPS + 1} steps", f"train.log_every={log_every} steps"]
    sets += ["train.eval_every=0 steps", "train.checkpoint_every=0 steps", "schedule.warmup=0 steps"]
    return load_recipe(ROOT / "jobs/digits.py", sets)


@contextmanager
def tracked(
    recipe: Recipe, output: Path, name: str = "tracked"
) -> Iterator[tuple[Tracker, str, MlflowPublisher]]:
    """Yield what rank 0 logs to, the place of its run, and the publisher that a driver has beside it."""
    run = choose_run(output, recipe, name, resume=False)
    run.write()
    publisher = MlflowPublisher(RunRecord(run, recipe, output), lambda entry: None)
    publisher.start()
    with Spool(run.spool) as spool:
        yield spool, run.location, publisher
    publisher.abandon()


def measure_steps(folder: Path, rounds: int) -> None:
    on, off = threading.Semaphore(0), threading.Semaphore(0)
    # Samples and uploads wait for the turns with tracking, which so have all of its cost.
    is_on = threading.Event()
    sample_where(is_on.is_set)
    MlflowPublisher._may_send = lambda publisher: is_on.is_set()  # type: ignore[method-assign]
    is_on.set()
    everything, nothing = (
        recipe_of(folder, rounds, LOG_EVERY),
        recipe_of(folder, rounds, rounds * TURN_STEPS + 1),
    )
    with tracked(everything, folder) as (spool, place, _):
        with_all, with_none = Turns(rounds, on, off, is_on.set), Turns(rounds, off, on, is_on.clear)
        first = _begin(everything, place, spool, with_all)
        parts.usage_of = lambda world: NodeUsage([])  # type: ignore[attr-defined]
        second = _begin(nothing, str(folder / "bare"), NullTracker(), with_none)
        before = [cpu_seconds_of(name) for name in THREADS]
        on.release()
        second.join()
        spent = [cpu_seconds_of(name) - begin for name, begin in zip(THREADS, before, strict=True)]
        first.join()
    _print_ratios(with_all, with_none)
    num_lines = rounds * TURN_STEPS // LOG_EVERY
    in_loop = sum(with_all.cpu_seconds) - sum(with_none.cpu_seconds)
    each = [
        f"{name} {1e3 * seconds / num_lines:.2f} ms" for name, seconds in zip(THREADS, spent, strict=True)
    ]
    print(
        f"CPU for each of {num_lines} log lines: in the loop {1e3 * in_loop / num_lines:.2f} ms, threads {', '.join(each)}"
    )


def _print_ratios(with_all: Turns, with_none: Turns) -> None:
    for kind, some, others in (
        ("seconds", with_all.seconds[1:], with_none.seconds[1:]),
        ("CPU seconds of the loop", with_all.cpu_seconds[1:], with_none.cpu_seconds[1:]),
    ):
        ratios = [a / b for a, b in zip(some, others, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{len(ratios)} rounds of {TURN_STEPS} steps; step {statistics.median(others) / TURN_STEPS:.4f} s without tracking; "
            f"{kind} with all of it {middle:.4f} × (quartiles {low:.4f} and {high:.4f}; of all {sum(some) / sum(others):.4f})"
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
    """Compare three loops that take turns: untracked, with a server that is killed for a third of the time, with none."""
    first, second, third = (threading.Semaphore(0) for _ in range(3))
    everyone = object()
    active: list[object] = [everyone]  # the publisher whose loop has its turn
    MlflowPublisher._may_send = lambda publisher: publisher in active or everyone in active  # type: ignore[method-assign]
    sample_where(lambda: bool(active))
    recipe, silent = (
        recipe_of(folder, 3 * rounds, LOG_EVERY),
        recipe_of(folder, 3 * rounds, 3 * rounds * TURN_STEPS + 1),
    )
    with postgresql_database() as store, ExitStack() as stack:
        server = MlflowServer(folder, store)
        server.start()
        stack.callback(server.kill)
        times: list[float] = []

        def change() -> None:
            active.clear()
            times.append(time.monotonic())
            if len(times) == rounds + 1:
                server.kill()
            elif len(times) == 2 * rounds + 1:
                server.start()

        def begin(publisher: MlflowPublisher) -> None:
            active[:] = [publisher]

        loops: list[tuple[Turns, MlflowPublisher, threading.Thread]] = []
        for name, address, mine, other in (
            ("served", server.address, second, third),
            ("away", unused_address(), third, first),
        ):
            os.environ[URI_VARIABLE] = address
            spool, place, publisher = stack.enter_context(tracked(recipe, folder, name))
            turns = Turns(3 * rounds, mine, other, partial(begin, publisher))
            loops.append((turns, publisher, _begin(recipe, place, spool, turns)))
        parts.usage_of = lambda world: NodeUsage([])  # type: ignore[attr-defined]
        untracked = Turns(3 * rounds, first, second, change)
        threads = [_begin(silent, str(folder / "bare"), NullTracker(), untracked), *(one[2] for one in loops)]
        first.release()
        for thread in threads:
            thread.join()
        active[:] = [everyone]
        (served, publisher, _), (away, lost, _) = loops
        publisher.finish(WAIT_SECONDS)
        lost.finish(1.0)
        client = mlflow.MlflowClient(server.address)
        assert publisher.run_id is not None
        steps = [one.step for one in client.get_metric_history(publisher.run_id, "train/loss")]
    up, down = [*range(1, rounds), *range(2 * rounds + 1, 3 * rounds)], [*range(rounds, 2 * rounds)]
    _print_turns("with the server", served, untracked, up)
    _print_turns(
        f"while it was killed for {times[2 * rounds] - times[rounds]:.0f} s", served, untracked, down
    )
    _print_turns("with a server that is never there", away, untracked, [*range(1, 3 * rounds)])
    print(
        f"of {3 * rounds * TURN_STEPS // LOG_EVERY + 1} log lines the server has {len(steps)}, {len(set(steps))} different; "
        f"left: {', '.join(publisher.unsent) or 'nothing'}; without a server: {', '.join(lost.unsent)}"
    )


def _print_turns(what: str, some: Turns, others: Turns, numbers: list[int]) -> None:
    ratios = [some.seconds[number] / others.seconds[number] for number in numbers]
    sums = [sum(seconds[number] for number in numbers) for seconds in (some.seconds, others.seconds)]
    cpu = [sum(seconds[number] for number in numbers) for seconds in (some.cpu_seconds, others.cpu_seconds)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{what}: {sums[0] / sums[1]:.4f} × of the seconds of {len(numbers)} turns of {TURN_STEPS} steps (median {middle:.4f}, "
        f"quartiles {low:.4f} and {high:.4f}), {cpu[0] / cpu[1]:.4f} × of the CPU seconds of the loop; "
        f"step {sums[1] / len(numbers) / TURN_STEPS:.4f} s"
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
    collect_rarely()  # As every command does; the first loop returns to Python's pace.
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
