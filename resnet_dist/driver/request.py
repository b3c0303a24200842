"""The request of a person to train, and the forms of its outcome."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from resnet_dist.config import Recipe
from resnet_dist.launch.torchrun import TorchrunRanks
from resnet_dist.runs.folder import RunFolder
from resnet_dist.system.command import DEFAULT_WORKERS
from resnet_dist.tracking.spool import Entry
from resnet_dist.train.loop import Outcome


@dataclass(frozen=True)
class Request:
    """What a person asked for."""

    recipe: Recipe
    source: str  # the recipe file
    output: Path
    workers: int | None = None  # under Ray; 2
    gpu: bool | None = None  # None: where there are any
    local: bool = False
    address: str | None = None
    name: str | None = None
    resume: bool = False
    torchrun: TorchrunRanks | None = None  # this process is their rank 0
    tags: Mapping[str, str] = field(default_factory=dict)  # of the run in MLflow, beside those of every run

    @property
    def world_size(self) -> int:
        if self.torchrun is not None:
            return int(self.torchrun.world_size)
        return 1 if self.local else self.workers or DEFAULT_WORKERS


@dataclass(frozen=True)
class Summary:
    run: RunFolder
    outcome: Outcome
    checkpoint: Path | None
    seconds: float
    unsent_metrics: int


class Interrupted(Exception):
    """A person or the cluster stopped the run; `run` resumes from its newest checkpoint."""

    exit_code = 130

    def __init__(self, run: RunFolder, step: int | None) -> None:
        super().__init__(f"run {run.name} was interrupted")
        self.run, self.step = run, step


class Reporter(Protocol):
    """What the person sees while the driver works."""

    def note(self, text: str) -> None: ...

    def begin(self, total_steps: int) -> None: ...

    def entry(self, entry: Entry) -> None: ...
