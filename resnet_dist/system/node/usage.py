"""Sample the use of this machine in a thread of its own: reading a GPU's power may take as long as a step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

from resnet_dist.system.node.gpus import gpu_use
from resnet_dist.system.node.host import host_use

SAMPLE_SECONDS = 2.0
QUANTITIES = (
    "cpu_percent",
    "memory_percent",
    "disk_percent",
    "disk_read_mb_per_second",
    "disk_write_mb_per_second",
    "network_received_mb_per_second",
    "network_sent_mb_per_second",
    "gpu_percent",
    "gpu_memory_percent",
    "gpu_power_watts",
    "gpu_celsius",
)
COUNT, MIN, MEAN, MAX = range(4)  # places in the summary of a quantity
NUM_SUMMARY = 4
NO_SUMMARY = [0.0] * (len(QUANTITIES) * NUM_SUMMARY)


class Source(Protocol):
    """Measures quantities of this machine."""

    def read(self) -> dict[str, list[float]]:
        """Return the values by quantity: one, or one for each GPU. May raise anything."""


class NodeUsage:
    """The use of this machine since the last `restart`. Sampling never raises into the training, and never ends.

    sources: none for a rank that shares its machine with the one that samples.
    """

    def __init__(self, sources: Sequence[Source], sample_seconds: float = SAMPLE_SECONDS) -> None:
        self._sources, self._sample_seconds = sources, sample_seconds
        self._sums: dict[str, list[float]] = {}
        self._counts: dict[str, int] = {}
        self._summary = NO_SUMMARY
        self._lock = threading.Lock()
        self._closed = threading.Event()
        if sources:
            # A daemon thread: a driver that hangs must not keep the process alive.
            threading.Thread(target=self._run, name="usage", daemon=True).start()

    @property
    def is_new(self) -> bool:
        """Report whether there was a sample since the last `restart`."""
        return bool(self._counts)

    def summary(self) -> list[float]:
        """Return count, minimum, mean and maximum over the things (GPUs, or this machine) of each of QUANTITIES.

        Each is the mean over the samples since the last `restart`; where there was none, over those before it.
        """
        with self._lock:
            if self._counts:
                means = {
                    name: [one / self._counts[name] for one in sums] for name, sums in self._sums.items()
                }
                self._summary = [value for name in QUANTITIES for value in _summary_of(means.get(name, []))]
            return self._summary

    def restart(self) -> None:
        with self._lock:
            self._sums, self._counts = {}, {}

    def close(self) -> None:
        """End the thread soon; it is not waited for, because it may be waiting for a driver."""
        self._closed.set()

    def sample(self) -> None:
        """Take one sample of every source; one that fails is left out this time."""
        for source in self._sources:
            with suppress(Exception):
                values = source.read()
                with self._lock:
                    self._add(values)

    def _add(self, values: dict[str, list[float]]) -> None:
        for name, new in values.items():
            old = self._sums.get(name, [])
            if len(old) != len(new):  # the first sample, or a GPU that has gone
                self._sums[name], self._counts[name] = list(new), 1
            else:
                self._sums[name] = [one + other for one, other in zip(old, new, strict=True)]
                self._counts[name] += 1

    def _run(self) -> None:
        while not self._closed.wait(self._sample_seconds):
            self.sample()


class _Late:
    """A source that the sampling thread makes: a driver that hangs or raises must not reach the training thread.

    psutil measures the CPU from one call to the next of the same thread.
    """

    def __init__(self, make: Callable[[], Source | None]) -> None:
        self._make: Callable[[], Source | None] | None = make
        self._source: Source | None = None

    def read(self) -> dict[str, list[float]]:
        if self._make is not None:
            make, self._make = self._make, None  # once: what fails now fails again
            self._source = make()
            return {}
        return self._source.read() if self._source is not None else {}


def start_usage(gpu_uuids: Sequence[str], *, samples: bool) -> NodeUsage:
    """Start to sample this machine and these GPUs of it; `samples` false: another rank of the machine does."""
    return NodeUsage([_Late(host_use), _Late(lambda: gpu_use(gpu_uuids))] if samples else [])


def _summary_of(values: Sequence[float]) -> list[float]:
    if not values:
        return [0.0] * NUM_SUMMARY
    return [float(len(values)), min(values), sum(values) / len(values), max(values)]
