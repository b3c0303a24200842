"""Describe the free part of the connected cluster, and who holds the rest, to a person who waits: truly or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.core.generated import gcs_pb2

from resnet_dist.launch.jobs.job import RUN

SUBMISSION = "job_submission_id"  # in the metadata of a job: Ray's name of a submitted one
UNKNOWN = "what is free is not known, because the cluster does not answer"
_GROUP, _ACTOR = gcs_pb2.PlacementGroupTableData, gcs_pb2.ActorTableData
# In the other states nothing is held, or nothing any more.
_PLACED = (_GROUP.PREPARED, _GROUP.CREATED, _GROUP.RESCHEDULING)
# Asked for in this order: one that starts between the two answers is in both, and not in neither.
_RUNS = ("PENDING_CREATION", "ALIVE")
_DIGITS = 4  # Ray counts ten-thousandths of a CPU; what a sum of floats has below them nobody holds.


@dataclass(frozen=True)
class Part:
    """Some CPUs and GPUs."""

    cpus: float = 0.0
    gpus: float = 0.0

    @classmethod
    def of(cls, resources: Mapping[str, float]) -> Part:
        # What an actor takes from a reserved place has other names, and is counted with the place.
        return cls(resources.get("CPU", 0.0), resources.get("GPU", 0.0))

    def __add__(self, other: Part) -> Part:
        return Part(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: Part) -> Part:
        cpus, gpus = self.cpus - other.cpus, self.gpus - other.gpus
        return Part(max(0.0, round(cpus, _DIGITS)), max(0.0, round(gpus, _DIGITS)))

    def at_most(self, limit: Part) -> Part:
        return Part(min(self.cpus, limit.cpus), min(self.gpus, limit.gpus))

    def __bool__(self) -> bool:
        return self.cpus > 0 or self.gpus > 0

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPU(s)"] if self.cpus or not self.gpus else []
        return " and ".join([*parts, *([f"{self.gpus:g} GPU(s)"] if self.gpus else [])])


@dataclass(frozen=True)
class Usage:
    """The CPUs and GPUs of a cluster: of all nodes, what is free of each, and what each job holds."""

    total: Part
    free: tuple[Part, ...]  # of each node
    held: Mapping[str, Part] = field(default_factory=dict)  # by the name of the holder, this process's first

    def __str__(self) -> str:
        taken = sum(self.held.values(), Part())
        # Nodes report what is free some moments after a place is taken.
        free = sum(self.free, Part()).at_most(self.total - taken)
        text = f"{free.cpus:g} of {self.total.cpus:g} CPUs"
        if self.total.gpus:
            text += f" and {free.gpus:g} of {self.total.gpus:g} GPUs"
        text += " are free"
        most = max((part.cpus for part in self.free), default=0.0)
        if most < free.cpus:
            text += f", {most:g} CPU(s) at most on one node"
        # Tasks hold the rest; Ray has no list of them.
        rest = self.total - free - taken
        holders = [f"{name} holds {part}" for name, part in self.held.items() if part]
        holders += [f"others hold {rest}"] if rest else []
        return text + (f" ({', '.join(holders)})" if holders else "")


def free_and_held() -> str:
    """Describe what is free and who holds the rest, as in "0 of 2 CPUs are free (run first holds 2 CPU(s))"."""
    try:
        return str(_usage())
    except Exception:  # Ray raises several types where its head does not answer.
        return UNKNOWN


def ranks_are_placed() -> bool:
    """Report whether the ranks that this process has asked for have all their places; False where it is not known."""
    try:
        own = ray.get_runtime_context().get_worker_id()
        controllers = {actor.actor_id for actor in _actors() if actor.owner_address.worker_id.hex() == own}
        groups = [group for group in _groups() if group.creator_actor_id in controllers]
    except Exception:  # As above.
        return False
    asked = [group for group in groups if group.state != _GROUP.REMOVED]
    return bool(asked) and all(group.state == _GROUP.CREATED for group in asked)


def _usage() -> Usage:
    totals, free = cluster_state.total_resources_per_node(), cluster_state.available_resources_per_node()
    held = _held_by_job(set(totals))
    names = _names_of_jobs()
    own = ray.get_runtime_context().get_job_id()
    by_name = {"this command": held.pop(own, Part())}
    for job, part in held.items():
        name = names.get(job, f"Ray job {job}")
        by_name[name] = by_name.get(name, Part()) + part
    total = sum((Part.of(resources) for resources in totals.values()), Part())
    return Usage(total, tuple(Part.of(free.get(node_id, {})) for node_id in totals), by_name)


def _held_by_job(alive: set[str]) -> dict[str, Part]:
    """Return what the places and the actors of each job hold, by Ray's id of the job. alive: the ids of nodes."""
    held: dict[str, Part] = {}
    for group in _groups():
        if group.state in _PLACED:
            bundles = [bundle for bundle in group.bundles if bundle.node_id.hex() in alive]
            parts = (Part.of(bundle.unit_resources) for bundle in bundles)
            job = group.creator_job_id.hex()
            held[job] = sum(parts, held.get(job, Part()))
    for actor in _actors():
        if actor.address.node_id.hex() in alive:
            job = actor.job_id.hex()
            held[job] = held.get(job, Part()) + Part.of(actor.required_resources)
    return held


def _names_of_jobs() -> dict[str, str]:
    """Return the jobs whose drivers run, by Ray's id: the name of a run, or that of a submitted job."""
    accessor = cluster_state._connect_and_get_accessor()
    answer = accessor.get_job_table(skip_submission_job_info_field=True, skip_is_running_tasks_field=True)
    names = {}
    for job in map(gcs_pb2.JobTableData.FromString, answer):
        metadata = job.config.metadata
        if metadata.get(RUN):
            names[job.job_id.hex()] = f"run {metadata[RUN]}"
        elif metadata.get(SUBMISSION):
            names[job.job_id.hex()] = f"job {metadata[SUBMISSION]}"
    return names


# Ray's own tables leave out the job and the actor that have made a group, and what an actor requires.
def _groups() -> Iterable[Any]:
    return map(_GROUP.FromString, cluster_state._connect_and_get_accessor().get_placement_group_table())


def _actors() -> Iterable[Any]:
    """Return the actors that run or start. Ray leaves out the others: its head keeps up to 100,000 that have ended."""
    accessor = cluster_state._connect_and_get_accessor()
    tables = [table for state in _RUNS for table in accessor.get_actor_table(None, state)]
    return {actor.actor_id: actor for actor in map(_ACTOR.FromString, tables)}.values()
