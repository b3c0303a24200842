"""The cluster of a test, without Ray."""

from __future__ import annotations

import pytest

from tests.launch.on_ray.placement.fake_cluster import FakeCluster


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(monkeypatch)
