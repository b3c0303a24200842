"""The setting of a call: folders, limits, the device, and the tiny sizes of a rehearsal."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnet_dist.config import Recipe, load_recipe
from resnet_dist.data.shards.build import build_index
from resnet_dist.data.shards.index import read_index
from resnet_dist.data.shards.names import expand
from resnet_dist.data.storage.cache.folder import CacheLimits
from resnet_dist.world import World
from tests.paths import JOBS

Result = dict[str, Any]
# The name of a measurement, and its numbers; a later one replaces an earlier one.
Results = Iterator[tuple[str, Result]]


class Run(NamedTuple):
    """A training with one seed: the seconds of its parts, and the top-1 of the last weights."""

    whitening_seconds: float
    training_seconds: float
    evaluation_seconds: float
    top1: float


@dataclass(frozen=True)
class Setting:
    """One call. Shapes of a rehearsal are tiny, and nothing that it measures is a figure."""

    cifar: Path | None
    photographs: Path | None
    work: Path
    rehearsal: bool
    deadline: float  # of this part, by time.monotonic

    @property
    def world(self) -> World:
        return World.single(gpu=not self.rehearsal)

    @property
    def device(self) -> torch.device:
        return self.world.device

    def choose(self, measured: Any, rehearsed: Any) -> Any:
        return rehearsed if self.rehearsal else measured

    def is_over(self, needed_seconds: float = 0.0) -> bool:
        """Report whether less than `needed_seconds` are left for this part."""
        return time.monotonic() + needed_seconds > self.deadline

    def now(self) -> float:
        """Return the time in seconds once the device has finished what was submitted."""
        if not self.rehearsal:
            torch.cuda.synchronize()
        return time.perf_counter()

    def recipe(self, job: str, overrides: Sequence[str], data: Path | None) -> Recipe:
        """Return a job's recipe on a folder of prepared data; None: nothing is read."""
        place = "synthetic" if data is None else str(data)
        small = [] if job.startswith("cifar10_fast") else ["model.name=resnet8", "data.image_size=16"]
        return load_recipe(
            JOBS / f"{job}.py",
            [
                *(f"data.train={place}/train", f"data.eval={place}/eval", "data.source=none"),
                *(small if self.rehearsal else []),
                *overrides,
            ],
        )


def small_steps(setting: Setting, job: str) -> list[str]:
    """Return the overrides with which a rehearsal trains a job for CIFAR-10 on the device; none for a measurement."""
    if not setting.rehearsal:
        return []
    # One of the two in the precision of the measurement, which most CPUs emulate, slowly.
    precision = ["train.precision=fp32"] if job == "cifar10_fast" else ["train.length=2 steps"]
    return ["train.length=6 steps", "data.global_batch_size=32", *precision]


def repeated(shards: Path, work: Path, min_samples: int) -> Path:
    """Return an index of the shards in `shards`, as often as it takes for `min_samples`: a few photographs for an epoch."""
    index = read_index(str(shards))
    times = -(-min_samples // index.num_samples)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    names = []
    for number in range(times):
        for shard in index.shards:
            names.append(work / f"{number:04d}-{Path(shard.url).name}")
            names[-1].symlink_to(shards.absolute() / Path(shard.url).name)
    build_index(expand([str(name) for name in names]), work, CacheLimits(work / "cache", 1, 60.0))
    return work
