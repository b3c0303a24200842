"""A line about a wait is true: what is free, and which job holds the rest, this one among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.core.generated import gcs_pb2
from ray.util.placement_group import placement_group

from resnet_dist.launch.jobs.job import RUN
from resnet_dist.launch.on_ray import watch
from resnet_dist.launch.on_ray.connect import connected
from resnet_dist.launch.on_ray.placement import held
from resnet_dist.launch.on_ray.placement.fit import Placement
from resnet_dist.launch.on_ray.watch import StartWatch
from resnet_dist.runs.folder import RunFolder
from resnet_dist.runs.storage.open import open_storage
from tests.launch.jobs.real_head import wait_until

NODES, NO_NODE = {"a1": b"\xa1", "b2": b"\xb2"}, b"\xff"
OWN, OTHER, THIRD = b"\x01", b"\x02", b"\x03"
WORKER, CONTROLLER = b"\x77", b"\xc0"
Group, Actor = gcs_pb2.PlacementGroupTableData, gcs_pb2.ActorTableData
ONE_CPU = {"CPU": 1.0}


def group(job: bytes, state: int, *nodes: bytes, each: Mapping[str, float] = ONE_CPU) -> bytes:
    made = Group(creator_job_id=job, creator_actor_id=CONTROLLER, state=state)
    for node in nodes:
        made.bundles.add(node_id=node, unit_resources=each)
    return bytes(made.SerializeToString())


def actor(
    job: bytes,
    state: int,
    node: bytes,
    needs: Mapping[str, float],
    owner: bytes = b"",
    actor_id: bytes = CONTROLLER,
) -> bytes:
    made = Actor(job_id=job, state=state, required_resources=needs, actor_id=actor_id)
    made.address.node_id, made.owner_address.worker_id = node, owner
    return bytes(made.SerializeToString())


def job(number: bytes, metadata: Mapping[str, str]) -> bytes:
    made = gcs_pb2.JobTableData(job_id=number)
    made.config.metadata.update(metadata)
    return bytes(made.SerializeToString())


class Tables:
    """The tables of the head of a cluster of two nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[bytes] = []
        self.actors: list[bytes] = []
        self.jobs: list[bytes] = []
        self.total: dict[str, dict[str, float]] = {node: {"CPU": 4.0} for node in NODES}
        self.free: dict[str, dict[str, float]] = {node: {"CPU": 4.0} for node in NODES}
        accessor = SimpleNamespace(
            get_placement_group_table=lambda: self.groups,
            get_actor_table=self.actors_in,
            get_job_table=lambda **_: self.jobs,
        )
        state = SimpleNamespace(
            total_resources_per_node=lambda: self.total,
            available_resources_per_node=lambda: self.free,
            _connect_and_get_accessor=lambda: accessor,
        )
        context = SimpleNamespace(get_job_id=OWN.hex, get_worker_id=WORKER.hex)
        monkeypatch.setattr(held, "cluster_state", state)
        monkeypatch.setattr(held, "ray", SimpleNamespace(get_runtime_context=lambda: context))

    def actors_in(self, job: None, state: str) -> list[bytes]:
        wanted = Actor.ActorState.Value(state)
        return [table for table in self.actors if Actor.FromString(table).state == wanted]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Tables:
    return Tables(monkeypatch)


def test_who_holds_what(tables: Tables) -> None:
    assert held.free_and_held() == "8 of 8 CPUs are free, 4 CPU(s) at most on one node"
    a, b = NODES.values()
    tables.groups = [
        group(OWN, Group.CREATED, a, b),
        group(OWN, Group.PENDING, NO_NODE),
        group(OTHER, Group.REMOVED, a),
        group(THIRD, Group.RESCHEDULING, b, NO_NODE, each={"CPU": 2.0}),
    ]
    tables.actors = [
        actor(OTHER, Actor.PENDING_CREATION, a, ONE_CPU, actor_id=b"1"),
        actor(OTHER, Actor.ALIVE, a, ONE_CPU, actor_id=b"1"),  # It has started between two questions.
        actor(OTHER, Actor.PENDING_CREATION, NO_NODE, ONE_CPU, actor_id=b"2"),
        actor(OTHER, Actor.DEAD, a, ONE_CPU, actor_id=b"3"),
        # It is in a place that was counted.
        actor(OWN, Actor.ALIVE, a, {"CPU_group_0_1": 1.0}, actor_id=b"4"),
    ]
    tables.jobs = [job(OTHER, {RUN: "first"}), job(THIRD, {"job_submission_id": "raysubmit_3"})]
    tables.free = {"a1": {"CPU": 1.0}, "b2": {"CPU": 1.0}}
    assert held.free_and_held() == (
        "2 of 8 CPUs are free, 1 CPU(s) at most on one node (this command holds 2 CPU(s), job raysubmit_3 holds 2 CPU(s), "
        "run first holds 1 CPU(s), others hold 1 CPU(s))"
    )


def test_what_a_job_holds_is_not_free_though_its_node_has_not_reported_it(tables: Tables) -> None:
    tables.groups = [group(OWN, Group.CREATED, *NODES.values(), each={"CPU": 4.0})]
    assert held.free_and_held() == "0 of 8 CPUs are free (this command holds 8 CPU(s))"


def test_what_sums_of_floats_leave_nobody_holds(tables: Tables) -> None:
    tables.total, tables.free = {"a1": {"CPU": 2.0}}, {"a1": {"CPU": 1.9}}
    tables.actors = [actor(OTHER, Actor.ALIVE, NODES["a1"], {"CPU": 0.1})]
    assert held.free_and_held() == "1.9 of 2 CPUs are free (Ray job 02 holds 0.1 CPU(s))"


def test_gpus_are_named_where_there_are_some(tables: Tables) -> None:
    tables.total = {"a1": {"CPU": 4.0, "GPU": 2.0}}
    tables.free = {"a1": {"CPU": 3.0}}
    tables.groups = [group(OTHER, Group.CREATED, NODES["a1"], each={"CPU": 1.0, "GPU": 2.0})]
    assert held.free_and_held() == (
        "3 of 4 CPUs and 0 of 2 GPUs are free (Ray job 02 holds 1 CPU(s) and 2 GPU(s))"
    )


def test_a_head_that_does_not_answer_is_no_number(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no GCS")

    monkeypatch.setattr(held.cluster_state, "total_resources_per_node", fail)
    monkeypatch.setattr(held.cluster_state, "_connect_and_get_accessor", fail)
    assert held.free_and_held() == held.UNKNOWN
    assert not held.ranks_are_placed()


STARTING = "all 2 have their places, with 1 CPU(s) each, and are starting"
WAITING = "2 wait for 1 CPU(s) each; 6 of 8 CPUs are free, 3 CPU(s) at most on one node ("


@pytest.mark.parametrize(
    ("state", "owner", "line"),
    [
        (Group.CREATED, WORKER, STARTING),
        (Group.PENDING, WORKER, WAITING),
        (Group.CREATED, b"\x78", WAITING),  # the ranks of another run of this job, as in a sweep
    ],
    ids=["placed", "pending", "another"],
)
def test_ranks_that_hold_their_places_do_not_wait_for_them(
    tables: Tables,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: int,
    owner: bytes,
    line: str,
) -> None:
    monkeypatch.setattr(watch, "LONG_START_SECONDS", 0.0)
    tables.free = {node: {"CPU": 3.0} for node in NODES}
    tables.groups = [group(OWN, Group.REMOVED, *NODES.values()), group(OWN, state, *NODES.values())]
    tables.actors = [actor(OWN, Actor.ALIVE, NODES["a1"], {}, owner)]
    lines: list[str] = []
    run = RunFolder(open_storage(tmp_path), "x", None, 1, {})
    start = StartWatch(run, Placement(2, 1, gpu=False), lines.append)
    start.report_if_late()
    start.report_if_late()
    (shown,) = lines
    assert shown.startswith(f"no rank has begun after 0 s: {line}")


@pytest.mark.long
@pytest.mark.timeout(200)
def test_a_real_cluster_is_read_as_the_tables_above(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    class Controller:
        """Reserves places as Ray Train's controller does, and starts an actor in one."""

        def reserve(self, num: int) -> None:
            self.places = placement_group([{"CPU": 1}] * num)
            ray.get(self.places.ready())

    # Ray's processes cannot import this module: send the class as a value.
    Controller.__module__ = "__main__"
    holder: Callable[..., Any] = ray.remote(Controller)
    with connected(None, workers=4):
        assert held.free_and_held().endswith(" CPUs are free")
        assert not held.ranks_are_placed()
        controller = holder.options(num_cpus=0).remote()
        ray.get(controller.reserve.remote(2))
        assert held.ranks_are_placed()
        other = holder.options(num_cpus=1).remote()
        other.reserve.remote(100)  # There is no room for so many places.
        wait_until(lambda: not held.ranks_are_placed(), 60.0)
        wait_until(lambda: "(this command holds 3 CPU(s))" in held.free_and_held(), 60.0)
