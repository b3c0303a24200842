"""Measure the use of the GPUs of this machine that a run trains on, by NVIDIA's management library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any

MILLIWATTS = 1000.0


class GpuUse:
    """The use of some GPUs. nvml: the module `pynvml`, which is initialised. handles: its handles of the GPUs."""

    def __init__(self, nvml: ModuleType, handles: Sequence[Any]) -> None:
        self._nvml, self._handles = nvml, handles

    def read(self) -> dict[str, list[float]]:
        """Return the values of all GPUs by quantity; one that a GPU does not measure is left out."""
        found: dict[str, list[float]] = {}
        for handle in self._handles:
            for name, measure in self._measures(handle).items():
                # A virtual GPU has no power, and a MIG slice no utilisation.
                with suppress(self._nvml.NVMLError):
                    found.setdefault(name, []).append(float(measure()))
        return found

    def _measures(self, handle: Any) -> dict[str, Callable[[], float]]:
        nvml = self._nvml

        def memory_percent() -> float:
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            return 100 * float(memory.used) / float(memory.total)

        return {
            "gpu_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu,
            "gpu_memory_percent": memory_percent,
            "gpu_power_watts": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / MILLIWATTS,
            "gpu_celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        }


def gpu_use(uuids: Sequence[str]) -> GpuUse | None:
    """Return the reader of the GPUs with these UUIDs; None without GPUs, and where NVML does not know them."""
    if not uuids:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return GpuUse(pynvml, [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids])
    except pynvml.NVMLError:  # no driver, or a device of another maker
        return None
