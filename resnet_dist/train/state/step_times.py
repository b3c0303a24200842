"""The time of this rank's steps: waiting for data, computing, and waiting for other ranks.

A rank that is slow makes all others wait in the all-reduce of the gradients, so the length of a step is the same on all
ranks and names nobody. What differs is the rank's own time: data and computation up to the point where it waits.

DDP sums gradients while the backward pass runs, and waits for the sums in a callback at its end. `computed` is called by
a callback that was queued before DDP's: after the last local gradient, before the wait.

- On a CPU the host computes, so its clock is read at these points. Buckets that gloo sends meanwhile take CPU time from
  the backward pass; this counts as computation.
- On CUDA the host runs ahead and nothing may wait for the device. Events are recorded on the stream, where DDP's wait
  is queued too, and read some steps later, if they have passed. Waiting for data is the time in which the device had
  nothing to do, as far as the host waited for a batch then.

With SyncBatchNorm the ranks also wait for one another inside both passes, which counts as computation of all of them:
only waiting for data then tells ranks apart.

Shapes: R ranks, T times: waiting for data, computing, waiting for other ranks; seconds per step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

DATA, COMPUTE, RANKS = range(3)  # places in a row of times
NUM_TIMES = 3
# Steps whose events may be under way: more than a host runs ahead of a device.
RING_STEPS = 16


class StepTimes(Protocol):
    """The times of this rank's steps since the last `restart`. In each step the four methods are called in order."""

    def begin(self, data_wait_seconds: float) -> None:
        """Begin a step, whose batch the loop has waited for."""

    def computed(self) -> None:
        """Mark the point at which this rank has its own gradients; the last call in a step counts."""

    def synced(self) -> None:
        """Mark the point at which it has the sums over all ranks."""

    def end(self) -> None:
        """End a step."""

    def means(self) -> list[float]:
        """Return T times: the means over the steps that were measured; zeros where none was."""

    def restart(self) -> None:
        """Begin anew, where the next step does not follow directly on the last one."""


class HostTimes:
    """Times by the clock of the host."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begin = self._computed = self._synced = 0.0
        self._sums, self._steps = [0.0] * NUM_TIMES, 0

    def begin(self, data_wait_seconds: float) -> None:
        self._sums[DATA] += data_wait_seconds
        self._begin = self._clock()

    def computed(self) -> None:
        self._computed = self._clock()

    def synced(self) -> None:
        self._synced = self._clock()

    def end(self) -> None:
        self._sums[COMPUTE] += self._computed - self._begin + self._clock() - self._synced
        self._sums[RANKS] += self._synced - self._computed
        self._steps += 1

    def means(self) -> list[float]:
        return [total / max(1, self._steps) for total in self._sums]

    def restart(self) -> None:
        self._sums, self._steps = [0.0] * NUM_TIMES, 0


def _timing_event() -> Any:
    return torch.cuda.Event(enable_timing=True)


@dataclass
class _Recorded:
    """The events of one step on the device."""

    begin: Any
    computed: Any
    synced: Any
    end: Any
    data_wait_seconds: float = 0.0
    pending: bool = False  # recorded, and not read yet
    step: int = -1  # counted from the first that was timed
    follows: bool = False  # directly on the step before


@dataclass
class DeviceTimes:
    """Times by events on the current CUDA stream. No method waits for the device."""

    make_event: Callable[[], Any] = _timing_event
    _steps: int = 0  # begun
    _follows: bool = False
    _sums: list[float] = field(default_factory=lambda: [0.0] * NUM_TIMES)
    _measured: int = 0

    def __post_init__(self) -> None:
        self._ring = [_Recorded(*(self.make_event() for _ in range(4))) for _ in range(RING_STEPS)]

    def begin(self, data_wait_seconds: float) -> None:
        # Read the oldest step before the slot of the one before it is used again.
        self._read(self._steps + 1)
        slot = self._ring[self._steps % RING_STEPS]
        slot.step, slot.follows, slot.pending = self._steps, self._follows, False
        slot.data_wait_seconds = data_wait_seconds
        slot.begin.record()

    def computed(self) -> None:
        self._ring[self._steps % RING_STEPS].computed.record()

    def synced(self) -> None:
        self._ring[self._steps % RING_STEPS].synced.record()

    def end(self) -> None:
        slot = self._ring[self._steps % RING_STEPS]
        slot.end.record()
        slot.pending = self._follows = True
        self._steps += 1

    def means(self) -> list[float]:
        for number in range(self._steps, self._steps + RING_STEPS):  # oldest first
            self._read(number)
        return [total / max(1, self._measured) for total in self._sums]

    def restart(self) -> None:
        self._follows = False
        self._sums, self._measured = [0.0] * NUM_TIMES, 0

    def _read(self, number: int) -> None:
        """Add the step in a slot, if the device has passed its end; a step that is read too late is left out."""
        slot = self._ring[number % RING_STEPS]
        if not slot.pending or not slot.end.query():
            return
        slot.pending = False
        before = self._ring[(number - 1) % RING_STEPS]
        if slot.follows and before.step == slot.step - 1:  # The slot before may hold a newer step by now.
            idle = before.end.elapsed_time(slot.begin) / 1000
            self._sums[DATA] += min(idle, slot.data_wait_seconds)
        own = slot.begin.elapsed_time(slot.computed) + slot.synced.elapsed_time(slot.end)
        self._sums[COMPUTE] += own / 1000
        self._sums[RANKS] += slot.computed.elapsed_time(slot.synced) / 1000
        self._measured += 1


def step_times(device: torch.device) -> StepTimes:
    return DeviceTimes() if device.type == "cuda" else HostTimes()


def time_metrics(times_RT: Tensor, step_seconds: float) -> dict[str, float]:
    """Return the metrics of the times of all ranks: their medians, and with several ranks the largest, and whose it is."""
    data_R, compute_R, ranks_R = times_RT.T.tolist()
    metrics = {
        "perf/step_seconds": step_seconds,
        "perf/data_wait_seconds": statistics.median_low(data_R),
        "perf/compute_seconds": statistics.median_low(compute_R),
    }
    if len(data_R) > 1:
        own_R = own_seconds(times_RT)
        metrics |= {
            "perf/max_data_wait_seconds": max(data_R),
            "perf/max_compute_seconds": max(compute_R),
            "perf/rank_wait_seconds": statistics.median_low(ranks_R),
            "perf/max_rank_wait_seconds": max(ranks_R),
            "perf/slowest_rank": float(own_R.index(max(own_R))),
        }
    return metrics


def own_seconds(times_RT: Tensor) -> list[float]:
    """Return the time of each rank's step without waiting for others."""
    return (times_RT[:, DATA] + times_RT[:, COMPUTE]).tolist()  # type: ignore[no-any-return]
