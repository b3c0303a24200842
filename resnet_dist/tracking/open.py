"""Open a publisher: that of MLflow where MLflow is installed, that of the console elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from time import time_ns

from resnet_dist.errors import UserError
from resnet_dist.tracking.protocol import Publisher, RunRecord, StudyPublisher, StudyRecord
from resnet_dist.tracking.spool import Entry


def has_mlflow() -> bool:
    """Report whether MLflow is installed.

    It is not imported for that: a broken installation must raise its own error later.
    """
    return find_spec("mlflow") is not None


def open_publisher(record: RunRecord, on_entry: Callable[[Entry], None]) -> Publisher:
    """Open the publisher of a run; `on_entry` receives each new entry of its spool.

    Raises UserError where the MLflow store cannot be used.
    """
    if has_mlflow():
        from resnet_dist.tracking.mlflow.publisher import MlflowPublisher

        return MlflowPublisher(record, on_entry)
    from resnet_dist.tracking.console import ConsolePublisher

    note = f"MLflow is not installed: metrics go to {record.run.spool} alone"
    on_entry(Entry(time_ns() // 1_000_000, note=note))
    return ConsolePublisher(record.run.spool, on_entry)


def open_study(record: StudyRecord) -> StudyPublisher:
    """Open the MLflow run that the study's runs are children of.

    Raises UserError where MLflow is not installed.
    """
    if not has_mlflow():
        raise UserError("MLflow, where the runs of a study lie together, is not installed")
    from resnet_dist.tracking.mlflow.study import MlflowStudy

    return MlflowStudy(record)
