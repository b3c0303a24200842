"""The changes of a cluster that are worth a new start."""

from __future__ import annotations

from resnet_dist.launch.on_ray.placement.changes import SETTLING_SECONDS, ClusterWatch
from resnet_dist.launch.on_ray.placement.fit import Node, Placement
from tests.launch.on_ray.placement.fake_cluster import FakeCluster


def test_a_leaving_node_matters_where_it_has_ranks(cluster: FakeCluster) -> None:
    watch = ClusterWatch(Placement(2, 1, gpu=False), [2, 1], lambda: ["a", "b"], clock=lambda: cluster.now)
    cluster.leaving = {"c": 0.0}
    assert watch.look() is None
    cluster.leaving = {"b": 0.0}
    assert watch.look() is None  # The cluster is asked once a second at most.
    cluster.now += 1
    assert watch.look() == "1 node(s) with ranks are being taken away"


def test_a_larger_size_is_used_when_the_nodes_have_settled(cluster: FakeCluster) -> None:
    watch = ClusterWatch(Placement(2, 1, gpu=False), [4, 2, 1], lambda: ["a", "a"], clock=lambda: cluster.now)
    cluster.alive = [Node(2, 0, "h1", "a"), Node(2, 0, "h2", "b")]
    cluster.free = {"a": {}, "b": {"CPU": 1.0}}  # Another job has one of its CPUs.
    assert watch.look() is None
    cluster.now += SETTLING_SECONDS + 1
    assert watch.look() is None
    cluster.free["b"]["CPU"] = 2.0
    cluster.now += 1
    assert watch.look() is None
    cluster.now += SETTLING_SECONDS / 2
    cluster.alive.pop()  # It went away again, which starts the time anew.
    assert watch.look() is None
    cluster.alive.append(Node(2, 0, "h2", "b"))
    cluster.now += 1
    assert watch.look() is None
    cluster.now += SETTLING_SECONDS
    assert watch.look() == "the cluster has room for 4 ranks instead of 2"


def test_the_largest_size_never_looks_for_more(cluster: FakeCluster) -> None:
    watch = ClusterWatch(Placement(2, 1, gpu=False), [2, 1], lambda: ["a"], clock=lambda: cluster.now)
    cluster.alive = [Node(64, 0, "h1", "a")]
    cluster.free = {"a": {"CPU": 62.0}}
    for _ in range(3):
        cluster.now += SETTLING_SECONDS
        assert watch.look() is None
