"""The request of a person to run a study, and the requests to train its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config import Study, Trial, WorkerRange
from resnet_dist.driver.preflight import resolve_paths
from resnet_dist.driver.request import Request
from resnet_dist.runs.group_folder import STUDIES_FOLDER


@dataclass(frozen=True)
class StudyRequest:
    """One request to run a study, with the flags of the command."""

    study: Study
    source: str  # the job file, as it was typed
    output: Path
    workers: int | None = None  # ranks under Ray; None: one rank in this process
    gpu: bool | None = None  # None: use GPUs where there are any
    address: str | None = None
    name: str | None = None
    also: tuple[str, ...] = ()  # what gets the metrics of the runs beside MLflow

    @property
    def full_name(self) -> str:
        return self.name or self.study.name

    @property
    def folder(self) -> Path:
        return self.output / STUDIES_FOLDER / self.full_name

    def of_trial(self, trial: Trial, tags: Mapping[str, str]) -> Request:
        """Return the request to train the run of `trial`; `tags` are added to the trial's own."""
        recipe = trial.recipe.model_copy(update={"experiment": self.study.experiment})
        return Request(
            resolve_paths(recipe, self.output),
            self.source,
            self.output,
            workers=WorkerRange.parse(str(self.workers or 1)),
            gpu=self.gpu,
            local=self.workers is None and self.address is None,
            address=self.address,
            name=f"{self.full_name}-{trial.name}",
            tags={**trial.tags, **tags},
            also=self.also,
        )
