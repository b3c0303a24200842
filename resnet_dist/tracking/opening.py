"""How the driver opens a tracker: MLflow where it is installed, the spool alone elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from time import time_ns
from typing import TYPE_CHECKING

from resnet_dist.config import UserError

if TYPE_CHECKING:
    from resnet_dist.driver import OpenTracking, Request, Tracking
    from resnet_dist.runs import RunFolder
    from resnet_dist.study import StudyRequest, StudyTracking
    from resnet_dist.tracking.spool import Entry


def has_mlflow() -> bool:
    """Whether MLflow is installed; an installation that is broken is no reason to go without it in silence."""
    return find_spec("mlflow") is not None


def tracking_opener(more_tags: Mapping[str, str]) -> OpenTracking:
    """How to open the tracker of a run, which gets these tags too."""

    def open_tracking(request: Request, run: RunFolder, on_entry: Callable[[Entry], None]) -> Tracking:
        if not has_mlflow():
            from resnet_dist.tracking.plain import PlainTracking
            from resnet_dist.tracking.spool import Entry

            note = f"MLflow is not installed: metrics go to {run.spool} alone"
            on_entry(Entry(time_ns() // 1_000_000, note=note))
            return PlainTracking(run.spool, on_entry)
        from resnet_dist.tracking.driver import MlflowTracking

        return MlflowTracking(
            request.output,
            request.recipe,
            name=run.name,
            run_id=run.run_id,
            key=run.key,
            source=request.source,
            spool=run.spool,
            tags={
                "resnet_dist.folder": str(run.path),
                "resnet_dist.attempt": str(run.attempt),
                **more_tags,
            },
            on_entry=on_entry,
        )

    return open_tracking


def open_study(request: StudyRequest) -> StudyTracking:
    """The MLflow run that a study's runs lie under. Raises UserError where MLflow is not installed."""
    if not has_mlflow():
        raise UserError("MLflow, where the runs of a study lie together, is not installed")
    from resnet_dist.tracking.study import MlflowStudy

    return MlflowStudy(
        request.output,
        request.folder,
        experiment=request.study.experiment,
        name=request.full_name,
        source=request.source,
        description=request.study.description,
    )
