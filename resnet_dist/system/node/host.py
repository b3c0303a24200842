"""Measure the use of CPU, memory, disk and network of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import ModuleType

MB = 1e6
DISK = "/"


class HostUse:
    """The use of this machine by all its programs. Rates are those since the last `read`.

    psutil: the module.
    """

    def __init__(self, psutil: ModuleType, clock: Callable[[], float] = time.monotonic) -> None:
        self._psutil, self._clock = psutil, clock
        self._before = self._counters()
        self._read_at = clock()
        psutil.cpu_percent()  # The first answer is meaningless: it begins the interval of the next one.

    def read(self) -> dict[str, list[float]]:
        """Return one value of each quantity that this machine has."""
        counters, now = self._counters(), self._clock()
        seconds = max(now - self._read_at, 1e-3)
        found = {
            "cpu_percent": [float(self._psutil.cpu_percent())],
            "memory_percent": [float(self._psutil.virtual_memory().percent)],
            "disk_percent": [float(self._psutil.disk_usage(DISK).percent)],
        }
        for name, value in counters.items():
            if name in self._before:
                found[name] = [max(0.0, value - self._before[name]) / MB / seconds]
        self._before, self._read_at = counters, now
        return found

    def _counters(self) -> dict[str, float]:
        """Return bytes since the machine started, by the quantity that their rate is."""
        counters = {}
        disk = self._psutil.disk_io_counters()
        if disk is not None:  # In some containers there is none.
            counters["disk_read_mb_per_second"] = float(disk.read_bytes)
            counters["disk_write_mb_per_second"] = float(disk.write_bytes)
        cards = [card for name, card in self._psutil.net_io_counters(pernic=True).items() if name != "lo"]
        counters["network_received_mb_per_second"] = float(sum(card.bytes_recv for card in cards))
        counters["network_sent_mb_per_second"] = float(sum(card.bytes_sent for card in cards))
        return counters


def host_use() -> HostUse | None:
    """Return the reader of this machine; None where psutil is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return HostUse(psutil)
