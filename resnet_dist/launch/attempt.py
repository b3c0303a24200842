"""The orders that every rank of an attempt receives, and the type of a launcher."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from resnet_dist.config import ProfiledSteps, Recipe
from resnet_dist.order.versions import NEWEST_VERSION
from resnet_dist.runs.folder import RunFolder
from resnet_dist.train.loop import Outcome

# A RankLauncher runs all ranks of one attempt to their end. It returns None where they were interrupted
# before they could save, and raises ClusterChanged where they have saved in order to start again.
RankLauncher = Callable[[RunFolder], Outcome | None]


@dataclass(frozen=True)
class Attempt:
    """The orders of one rank, as plain values that can be sent to other machines."""

    recipe_json: str
    folder: str  # the location of the run: an absolute path, or a URL
    cpus: int  # of each rank
    number: int  # 1 for the first attempt of a run
    token: str  # the name of what the driver has written to that location
    host: str  # the driver's
    order_version: int = NEWEST_VERSION  # of the run, see order/lanes.py
    threads: int | None = None  # that each rank computes with, as the run began; None: the ranks choose
    holder: str = ""  # id of the driver's lease of the run
    marks: dict[str, float] = field(default_factory=dict)  # the driver's times, see start_times
    profile: str = ""  # the steps to profile, such as 10:20
    restarts: int = 0  # that the run has had so far
    evaluates_beside: bool = False  # The driver has another process that evaluates checkpoints.

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        folder: RunFolder,
        *,
        cpus: int,
        marks: Mapping[str, float] = MappingProxyType({}),
    ) -> Attempt:
        before = folder.ranks()
        return cls(
            recipe.to_json(),
            folder.location,
            cpus,
            folder.attempt,
            folder.token,
            platform.node(),
            folder.order,
            before.threads if before else None,
            folder.lease.holder.id if folder.lease is not None else "",
            {**folder.marks, **marks},
            str(folder.profile or ""),
            len(folder.restarts),
        )

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_json(self.recipe_json)

    @property
    def profiled(self) -> ProfiledSteps | None:
        return ProfiledSteps.parse(self.profile) if self.profile else None


class ClusterChanged(Exception):
    """The ranks have stopped with a checkpoint, to start again on the nodes that the cluster has now.

    seen_at: when the change was seen, in seconds since 1970; None: now.
    """

    def __init__(self, message: str, seen_at: float | None = None) -> None:
        super().__init__(message)
        self.seen_at = seen_at
