"""The request of a person to run a sweep, and the requests to train its trials."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resnet_dist.config import DEFAULT_MAX_RESTARTS, Recipe, WorkerRange
from resnet_dist.driver.preflight import resolve_paths
from resnet_dist.driver.request import Request
from resnet_dist.runs.group_folder import SWEEPS_FOLDER
from resnet_dist.sweep.plan import PlannedTrial
from resnet_dist.sweep.search import Search
from resnet_dist.tracking.origin import changes_text

DEFAULT_METRIC = "eval/top1"
Scheduler = Literal["none", "asha"]


@dataclass(frozen=True)
class SweepRequest:
    """One request to run a sweep, with the flags of the command."""

    recipe: Recipe  # with the overrides
    file_recipe: Recipe  # as the file has it
    source: str  # the recipe file, as it was typed
    output: Path
    texts: tuple[str, ...]  # the searches, as they were typed
    searches: Sequence[Search]
    num_trials: int
    overrides: tuple[str, ...] = ()  # that the command sets for all trials
    seed: int = 0
    scheduler: Scheduler = "none"
    workers: int = 1  # ranks of each trial
    concurrent: int | None = None  # trials at the same time; None: as many as the machines have room for
    gpu: bool | None = None  # None: use GPUs where there are any
    address: str | None = None
    name: str | None = None
    max_restarts: int = DEFAULT_MAX_RESTARTS
    also: tuple[str, ...] = ()  # what gets the metrics of the runs beside MLflow

    @property
    def full_name(self) -> str:
        return self.name or f"{self.recipe.name}-sweep"

    @property
    def folder(self) -> Path:
        return self.output / SWEEPS_FOLDER / self.full_name

    @property
    def metric(self) -> str:
        return self.recipe.train.best_metric or DEFAULT_METRIC

    # The two fields that MLflow shows of the parent run, see tracking.protocol.Described.
    @property
    def experiment(self) -> str:
        return self.recipe.experiment or self.recipe.name

    @property
    def description(self) -> str:
        return self.recipe.description

    def names(self, num: int) -> list[str]:
        """Return the names of the runs of so many trials; they do not depend on the number."""
        return [f"{self.full_name}-{number:03}" for number in range(1, num + 1)]

    def of_trial(
        self, trial: PlannedTrial, tags: Mapping[str, str], *, gpu: bool | None, cpus: int | None
    ) -> Request:
        """Return the request to train a trial with so many CPUs for each of its ranks. Raises RecipeError."""
        recipe = self.recipe.with_overrides(trial.sets).model_copy(update={"experiment": self.experiment})
        local = self.workers == 1
        return Request(
            resolve_paths(recipe, self.output),
            self.source,
            self.output,
            workers=None if local else WorkerRange.exactly(self.workers),
            gpu=gpu,
            local=local,
            name=trial.name,
            tags=dict(tags),
            max_restarts=self.max_restarts,
            also=self.also,
            cpus=cpus,
            changes=changes_text(recipe, self.file_recipe),
        )
