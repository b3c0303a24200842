"""A step's time is split into data, computation and waiting for others, on the host's clock and on a device's."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from resnet_dist.config import Recipe
from resnet_dist.data.batches.loader import Loader
from resnet_dist.train import loop
from resnet_dist.train.state.step_times import RING_STEPS, DeviceTimes, HostTimes, time_metrics
from resnet_dist.train.tracker import NullTracker
from resnet_dist.train.watch.stragglers import Stragglers
from resnet_dist.world import World
from tests.train.ranks import run_ranks


def test_the_host_splits_a_step() -> None:
    clock = iter([10.0, 12.0, 15.0, 16.0, 20.0, 21.0, 22.0, 23.0])
    times = HostTimes(lambda: next(clock))
    for wait in (1.0, 3.0):
        times.begin(wait)
        times.computed()
        times.synced()
        times.end()
    assert times.means() == [2.0, (2 + 1 + 1 + 1) / 2, (3 + 1) / 2]
    times.restart()
    assert times.means() == [0.0, 0.0, 0.0]


@dataclass
class Device:
    """A stream of a device: it reaches its queued events one by one, at the times that the test gives them."""

    at: float = 0.0  # of the events that are recorded now
    reached: float = 0.0
    events: list[Event] = field(default_factory=list)


@dataclass
class Event:
    device: Device
    time: float | None = None

    def record(self) -> None:
        self.time = self.device.at

    def query(self) -> bool:
        assert self.time is not None
        return self.time <= self.device.reached

    def elapsed_time(self, end: Event) -> float:
        assert self.query(), "CUDA raises here"
        assert end.query(), "CUDA raises here"
        assert self.time is not None
        assert end.time is not None
        return 1000 * (end.time - self.time)


def queue_step(times: DeviceTimes, device: Device, *, idle: float = 0.0, wait: float = 0.0) -> None:
    """Queue a step of 6 s: 3 s forward and backward, 2 s for other ranks, 1 s update."""
    device.at += idle
    times.begin(wait)
    for method, seconds in ((times.computed, 3), (times.synced, 2), (times.end, 1)):
        device.at += seconds
        method()


def test_a_device_is_never_waited_for_and_its_steps_are_read_later() -> None:
    device = Device()
    times = DeviceTimes(lambda: Event(device))
    for step in range(5 * RING_STEPS):
        queue_step(times, device)
        device.reached = 6.0 * (step - 8)  # The host runs eight steps ahead.
    assert times.means() == pytest.approx([0, 4, 2])
    device.reached = device.at
    times.restart()
    queue_step(times, device)
    device.reached = device.at
    # The steps that were under way at the restart are counted now: no step is lost.
    assert times.means() == pytest.approx([0, 4, 2])


def test_data_counts_only_while_the_device_has_nothing_to_do() -> None:
    device = Device()
    times = DeviceTimes(lambda: Event(device))
    for _ in range(4):
        queue_step(times, device, idle=0.0, wait=1.0)  # The host waits, the device is busy.
        device.reached = device.at
    assert times.means() == pytest.approx([0, 4, 2])
    times.restart()
    for _ in range(4):
        queue_step(times, device, idle=2.0, wait=1.5)  # The device is idle, also for 0.5 s of something else.
        device.reached = device.at
    # The first step does not follow on another one: an evaluation may lie between them.
    assert times.means() == pytest.approx([1.5 * 3 / 4, 4, 2])


def test_a_host_too_far_ahead_costs_samples_and_nothing_else() -> None:
    device = Device()
    times = DeviceTimes(lambda: Event(device))
    for _ in range(3 * RING_STEPS):
        queue_step(times, device)
    assert times.means() == [0, 0, 0]
    device.reached = device.at
    assert times.means() == pytest.approx([0, 4, 2])


def test_the_metrics_are_few_on_any_number_of_ranks() -> None:
    one = time_metrics(torch.tensor([[0.1, 0.2, 0.0]], dtype=torch.float64), 0.3)
    assert one == {"perf/step_seconds": 0.3, "perf/data_wait_seconds": 0.1, "perf/compute_seconds": 0.2}
    rows = torch.tensor([[0.0, 0.2, 0.3]] * 499 + [[0.1, 0.4, 0.0]] + [[0.0, 0.2, 0.3]] * 500)
    many = time_metrics(rows.double(), 0.5)
    assert len(many) < 10
    assert many["perf/slowest_rank"] == 499
    assert many["perf/max_compute_seconds"] == pytest.approx(0.4)
    assert many["perf/compute_seconds"] == pytest.approx(0.2)
    assert many["perf/max_rank_wait_seconds"] == pytest.approx(0.3)


class Metrics(NullTracker):
    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.last |= metrics


DELAY_SECONDS = 0.3
# In the forward pass of its second step DDP agrees on its buckets, and waits for the other ranks there.
FIRST_LATE_STEP = 2


def delay_data(world: World, recipe_json: str, folder: str) -> tuple[dict[str, float], list[list[float]]]:
    """Train; rank 1 gets its data only after rank 0 has computed its gradients of the step, and a moment more."""
    store, tables = dist.distributed_c10d._get_default_store().clone(), list[list[list[float]]]()
    submit, computed, look = Loader._submit_until, HostTimes.computed, Stragglers.look
    steps = iter(range(10**6))

    def late_submit(self: Loader, step: int) -> None:
        if world.rank == 1 and self.order.training and step >= FIRST_LATE_STEP:
            store.wait([f"computed {step}"])
            threading.Event().wait(DELAY_SECONDS)
        submit(self, step)

    def signal_computed(self: HostTimes) -> None:
        computed(self)
        if world.rank == 0:
            store.set(f"computed {next(steps)}", "")

    def keep(self: Stragglers, times_RT: torch.Tensor) -> None:
        tables.append(times_RT.tolist())
        look(self, times_RT)

    metrics = Metrics()
    with (
        patch.object(Loader, "_submit_until", late_submit),
        patch.object(HostTimes, "computed", signal_computed),
        patch.object(Stragglers, "look", keep),
    ):
        loop.train(Recipe.from_json(recipe_json), Path(folder), world, metrics)
    return metrics.last, tables[0]


@pytest.mark.parametrize(("sums", "micro_batches"), [("fp32", False), ("fp64", True)], ids=str)
def test_the_rank_that_makes_the_other_wait_is_told_from_the_one_that_waits(
    digits_recipe: Recipe, tmp_path: Path, sums: str, micro_batches: bool
) -> None:
    """Rank 1 is late by the signal of rank 0: the order of events decides here, and no speed."""
    lengths = ["train.length=4 steps", "train.log_every=4 steps", "train.eval_every=0 steps"]
    size = "16" if micro_batches else "none"
    recipe = digits_recipe.with_overrides(
        [*lengths, f"train.gradient_sums={sums}", f"data.micro_batch_size={size}"]
    )
    (metrics, table), (_, same) = run_ranks(2, delay_data, recipe.to_json(), str(tmp_path))
    assert table == same
    (_, _, first_waits), (late_data, _, _) = table
    late_share = (4 - FIRST_LATE_STEP) / 4
    assert late_data >= DELAY_SECONDS * late_share
    assert first_waits >= DELAY_SECONDS * late_share
    assert metrics["perf/max_data_wait_seconds"] == late_data
    assert metrics["perf/max_rank_wait_seconds"] == first_waits
