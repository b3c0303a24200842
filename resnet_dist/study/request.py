"""The request of a person to run a study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.config import Study, Trial
from resnet_dist.driver.preflight import resolve_paths
from resnet_dist.driver.request import Request


@dataclass(frozen=True)
class StudyRequest:
    """What a person asked for."""

    study: Study
    source: str  # the job file
    output: Path
    workers: int | None = None  # None: one rank in this process
    gpu: bool | None = None
    address: str | None = None
    name: str | None = None

    @property
    def full_name(self) -> str:
        return self.name or self.study.name

    @property
    def folder(self) -> Path:
        return self.output / "studies" / self.full_name

    def of_trial(self, trial: Trial, tags: Mapping[str, str]) -> Request:
        """Return the request to train one run of the study, with more tags than the trial's own."""
        recipe = trial.recipe.model_copy(update={"experiment": self.study.experiment})
        return Request(
            resolve_paths(recipe, self.output),
            self.source,
            self.output,
            workers=self.workers or 1,
            gpu=self.gpu,
            local=self.workers is None and self.address is None,
            address=self.address,
            name=f"{self.full_name}-{trial.name}",
            tags={**trial.tags, **tags},
        )
