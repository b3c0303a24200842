"""Where ranks fit, the wait for room, and the changes of a cluster that are worth a new start."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from resnet_dist.config import WorkerRange
from resnet_dist.errors import RankFailed, UserError
from resnet_dist.launch.on_ray import nodes as ray_nodes
from resnet_dist.launch.on_ray.nodes import (
    REPORT_SECONDS,
    SETTLING_SECONDS,
    ClusterWatch,
    Node,
    Placement,
    Placer,
    Reserved,
    choose_placement,
    cpus_per_rank,
)

GPU_NODES = [Node(8, 1), Node(8, 1)]


def test_ranks_that_do_not_fit_are_refused() -> None:
    assert cpus_per_rank(GPU_NODES, 2, gpu=True) == 8
    assert cpus_per_rank(GPU_NODES, 3, gpu=False) == 4  # two on one node, one on the other
    assert cpus_per_rank(GPU_NODES, 16, gpu=False) == 1
    with pytest.raises(
        UserError, match=r"--workers 3: each needs one CPU and one GPU.*use --workers 2 or fewer"
    ):
        cpus_per_rank(GPU_NODES, 3, gpu=True)
    with pytest.raises(UserError, match="use --cpu"):
        cpus_per_rank([Node(4, 0)], 1, gpu=True)


def test_the_largest_size_that_fits_is_chosen_with_the_threads_of_before() -> None:
    assert choose_placement(GPU_NODES, [4, 2, 1], None, gpu=True) == Placement(2, 8, gpu=True)
    assert choose_placement(GPU_NODES, [4, 2, 1], 3, gpu=False) == Placement(4, 3, gpu=False)
    assert choose_placement([Node(2, 0)], [2], 2, gpu=False) == Placement(2, 1, gpu=False)  # fewer CPUs
    assert choose_placement([], [2, 1], None, gpu=False) is None


class FakeCluster:
    """A cluster whose nodes, free CPUs and leaving nodes a test sets, on a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.alive: list[Node] = []
        self.leaving: dict[str, float] = {}
        self.free: dict[str, dict[str, float]] = {}
        self.demands: list[int] = []
        self.at: dict[float, Callable[[], None]] = {}  # what happens when the clock reaches a time
        monkeypatch.setattr(ray_nodes, "nodes", lambda: self.alive)
        monkeypatch.setattr(ray_nodes, "draining", lambda: self.leaving)
        monkeypatch.setattr(ray_nodes, "request_resources", lambda bundles: self.demands.append(len(bundles)))
        monkeypatch.setattr(ray_nodes.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ray_nodes.time, "sleep", self.sleep)
        monkeypatch.setattr(ray_nodes.cluster_state, "available_resources_per_node", lambda: self.free)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for time in [time for time in self.at if time <= self.now]:
            self.at.pop(time)()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    return FakeCluster(monkeypatch)


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
