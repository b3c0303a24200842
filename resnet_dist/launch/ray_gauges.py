"""The gauges of a run among Ray's own metrics, which Prometheus reads from every node of the cluster."""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.metrics import Gauge


class RayGauges:
    """Sets gauges in the driver's process, which is connected to Ray. help_texts: of all gauges, by name."""

    def __init__(self, help_texts: Mapping[str, str]) -> None:
        self._gauges = {name: Gauge(name, text, tag_keys=("run",)) for name, text in help_texts.items()}

    def __call__(self, run: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._gauges[name].set(value, tags={"run": run})
