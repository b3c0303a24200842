"""How the driver opens a tracker: MLflow where it is installed, the spool alone elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resnet_dist.driver import OpenTracking, Request, Tracking
    from resnet_dist.runs import RunFolder
    from resnet_dist.study import StudyRequest, StudyTracking
    from resnet_dist.tracking.spool import Entry


def tracking_opener(more_tags: Mapping[str, str]) -> OpenTracking:
    """How to open the tracker of a run, which gets these tags too."""

    def open_tracking(request: Request, run: RunFolder, on_entry: Callable[[Entry], None]) -> Tracking:
        try:
            from resnet_dist.tracking.driver import MlflowTracking
        except ImportError:
            from resnet_dist.tracking.plain import PlainTracking

            print(f"MLflow is not installed: metrics go to {_short(run.spool)} alone")
            return PlainTracking(run.spool, on_entry)
        return MlflowTracking(  # type: ignore[return-value]  # its statuses are fewer than all strings
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
    """The MLflow run that a study's runs lie under."""
    from resnet_dist.tracking.study import MlflowStudy

    return MlflowStudy(  # type: ignore[return-value]  # as above
        request.output,
        request.folder,
        experiment=request.study.experiment,
        name=request.full_name,
        source=request.source,
        description=request.study.description,
    )


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
