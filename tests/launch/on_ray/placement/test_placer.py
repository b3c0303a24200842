"""The choice of a placement, and the wait for room."""

from __future__ import annotations

import pytest

from resnet_dist.config import WorkerRange
from resnet_dist.errors import RankFailed
from resnet_dist.launch.on_ray.placement.fit import Node, Placement
from resnet_dist.launch.on_ray.placement.placer import REPORT_SECONDS, Placer
from resnet_dist.launch.on_ray.placement.reserved import Reserved
from tests.launch.on_ray.placement.fake_cluster import FakeCluster


def placer(workers: str, sizes: list[int], notes: list[str]) -> Placer:
    return Placer(WorkerRange.parse(workers), sizes, gpu=False, wait_seconds=150, report=notes.append)


def never() -> bool:
    return False


def test_a_wait_is_reported_at_once_and_each_minute(cluster: FakeCluster) -> None:
    notes: list[str] = []
    cluster.alive = [Node(1, 0, "h1")]
    cluster.at[100 + REPORT_SECONDS + 5] = lambda: cluster.alive.append(Node(1, 0, "h2"))
    assert placer("2", [2, 1], notes).place(1, cluster.now, never) == Placement(2, 1, gpu=False)
    assert len(notes) == 2
    assert (
        notes[0] == "waiting for nodes, 150 s at most: 2 rank(s) need 1 CPU(s) each; h1 has 1 CPUs and 0 GPUs"
    )
    assert cluster.demands == [2, 2, 0]  # The demand of an autoscaler is withdrawn in the end.


def test_fewer_ranks_than_preferred_are_used_after_the_wait(cluster: FakeCluster) -> None:
    cluster.alive = [Node(1, 0, "h1")]
    assert placer("2", [2, 1], []).place(1, cluster.now, never) == Placement(1, 1, gpu=False)
    assert cluster.now >= 250
    cluster.now = 100.0
    assert placer("1:2", [2, 1], []).place(1, cluster.now, never) == Placement(1, 1, gpu=False)
    assert cluster.now == 100.0  # A range uses at once what fits.


def test_a_wait_ends(cluster: FakeCluster) -> None:
    with pytest.raises(
        RankFailed, match=r"no room for 2 rank\(s\).*150 s \(--wait\): the cluster has no node"
    ):
        placer("2:2", [2], []).place(1, cluster.now, never)
    assert cluster.demands[-1] == 0
    assert placer("2", [2], []).place(1, cluster.now, lambda: True) is None


def test_ranks_do_not_wait_for_the_part_of_another_process(cluster: FakeCluster) -> None:
    cluster.alive = [Node(1, 0, "h1", "a"), Node(1, 0, "h2", "b"), Node(1, 0, "h3", "c")]
    ranks = placer("2", [2, 1], [])
    ranks.reserved = Reserved("a", 1, 0)
    assert ranks.place(1, cluster.now, never) == Placement(2, 1, gpu=False)
    assert ranks.reserved is not None
    cluster.alive.pop()
    assert ranks.place(1, cluster.now, never) == Placement(2, 1, gpu=False)
    assert ranks.reserved is None
    assert cluster.now == 100.0
