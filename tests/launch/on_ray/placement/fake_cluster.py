"""A cluster that exists in the test alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from resnet_dist.launch.on_ray.placement import changes, placer
from resnet_dist.launch.on_ray.placement.fit import Node


class FakeCluster:
    """A cluster whose nodes, free CPUs and leaving nodes a test sets, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.alive: list[Node] = []
        self.leaving: dict[str, float] = {}
        self.free: dict[str, dict[str, float]] = {}
        self.demands: list[int] = []
        self.at: dict[float, Callable[[], None]] = {}  # what happens when the clock reaches a time
        for module in (changes, placer):
            monkeypatch.setattr(module, "nodes", lambda: self.alive)
        monkeypatch.setattr(changes, "draining", lambda: self.leaving)
        monkeypatch.setattr(placer, "request_resources", lambda bundles: self.demands.append(len(bundles)))
        monkeypatch.setattr(placer.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(placer.time, "sleep", self.sleep)
        monkeypatch.setattr(changes.cluster_state, "available_resources_per_node", lambda: self.free)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for time in [time for time in self.at if time <= self.now]:
            self.at.pop(time)()
