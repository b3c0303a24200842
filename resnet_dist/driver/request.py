"""The request of a person to train, and the result: a summary, or an interruption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from resnet_dist.config import ProfiledSteps, Recipe, WorkerRange
from resnet_dist.errors import INTERRUPTED_EXIT_CODE
from resnet_dist.launch.torchrun import TorchrunRanks
from resnet_dist.runs.folder import RunFolder
from resnet_dist.tracking.spool import Entry
from resnet_dist.train.loop import Outcome


@dataclass(frozen=True)
class Request:
    """One request to train a recipe, with the flags of the command."""

    recipe: Recipe
    source: str  # the recipe file, as it was typed
    output: Path | str  # a folder, or a URL
    workers: WorkerRange | None = None  # ranks under Ray; None: see preflight.with_workers
    gpu: bool | None = None  # None: use GPUs where there are any
    local: bool = False
    address: str | None = None
    name: str | None = None
    resume: bool = False
    begin_from: str | None = None  # RUN or RUN@STEP: the checkpoint that a new run begins with, see `fork`
    torchrun: TorchrunRanks | None = None  # set: this process is their rank 0
    tags: Mapping[str, str] = field(default_factory=dict)  # additional tags of the run in MLflow
    max_restarts: int = 0  # of lost ranks, within an hour
    # Limit for a wait for nodes; None: refuse a cluster that is too small now.
    wait_seconds: float | None = None
    also: tuple[str, ...] = ()  # what gets the metrics beside MLflow
    profile: ProfiledSteps | None = None  # steps whose trace is written beside the run
    register: str = ""  # NAME or NAME@ALIAS for the model; empty: those of a run that goes on, else none
    changes: str = ""  # what the command changes of the recipe file, without passwords
    cpus: int | None = None  # of each rank, where several runs share a machine; None: as many as there are

    @property
    def ranks(self) -> WorkerRange:
        """The numbers of ranks that this request allows."""
        if self.torchrun is not None:
            return WorkerRange.exactly(self.torchrun.world_size)
        if self.local:
            return WorkerRange.exactly(1)
        assert self.workers is not None
        return self.workers


@dataclass(frozen=True)
class Summary:
    """A run that is finished."""

    run: RunFolder
    outcome: Outcome
    checkpoint: str | None  # the path or URL of the newest one
    seconds: float  # from the request to the end
    not_evaluated: tuple[str, ...] = ()  # steps that were to be evaluated, each with the reason


class Interrupted(Exception):
    """A person or the cluster stopped the run at `step`; `run` resumes from its newest checkpoint."""

    exit_code = INTERRUPTED_EXIT_CODE

    def __init__(self, run: RunFolder, step: int | None) -> None:
        super().__init__(f"run {run.name} was interrupted")
        self.run, self.step = run, step


class Reporter(Protocol):
    """Shows a person the progress of the driver."""

    def note(self, text: str) -> None: ...

    def begin(self, total_steps: int) -> None: ...

    def entry(self, entry: Entry) -> None: ...
